"""Karcher 1977, "Riemannian center of mass and mollifier smoothing": gradient steps for the center on a sphere."""

import math

import torch


def karcher(base, models, max_iter=10, tol=1e-5, zero_norm=0.0):
    vectors = [model.double() for model in models]
    norms = [float(v.norm()) for v in vectors]
    units = [v / n for v, n in zip(vectors, norms, strict=True) if n > zero_norm]
    if not units:
        return sum(vectors) / len(vectors)
    share = 1 / len(units)
    point = sum(share * u for u in units)
    point = units[0] if point.norm() < tol else point / point.norm()
    for _ in range(max_iter):
        step = torch.zeros_like(point)
        for unit in units:
            cosine = min(1.0, max(-1.0, float((point * unit).sum())))
            theta = math.acos(cosine)
            if theta >= tol and math.sin(theta) > 1e-7:
                step += share * theta / math.sin(theta) * (unit - cosine * point)
        size = float(step.norm())
        if size < tol:
            break
        point = math.cos(size) * point + math.sin(size) / size * step
        point = point / point.norm()
    return sum(norms) / len(norms) * point
