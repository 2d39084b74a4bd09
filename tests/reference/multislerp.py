"""Multi-SLERP as documented by mergekit: mean direction, mean tangent there, exponential map, mean length."""

import math

import torch


def multislerp(base, models, weight, normalize_weights=True, eps=1e-8):
    if len(models) == 1:
        return models[0].double()
    origin = torch.zeros_like(models[0], dtype=torch.float64) if base is None else base.double()
    vectors = [model.double() - origin for model in models]
    if normalize_weights:
        weight = [w / sum(weight) for w in weight]
    norms = [float(v.norm()) for v in vectors]
    units = [v / n if n else v for v, n in zip(vectors, norms, strict=True)]
    direction = sum(w * u for w, u in zip(weight, units, strict=True))
    if direction.norm() <= eps * sum(abs(w) for w in weight):
        return origin + sum(w * v for w, v in zip(weight, vectors, strict=True))
    mean = direction / direction.norm()
    tangents = [u - (u * mean).sum() * mean for u in units]
    tangent = sum(w * v for w, v in zip(weight, tangents, strict=True))
    angle = float(tangent.norm())
    point = mean if angle == 0 else math.cos(angle) * mean + math.sin(angle) / angle * tangent
    return origin + sum(w * n for w, n in zip(weight, norms, strict=True)) * point
