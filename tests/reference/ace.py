"""Xu et al. 2026, "ACE-Merging", as the authors' code computes it, with an explicit inverse.

Unlike there: unchanged models are left out, one row is not centred, and the refinement has no more directions than its
matrix has.
"""

import torch

from tests.reference.decompositions import triplets, vectors


def heterogeneous(deltas, normalize):
    if normalize != "auto":
        return normalize == "always"
    logs = torch.stack([torch.log(torch.trace(delta.T @ delta) + 1e-12) for delta in deltas])
    return len(deltas) > 1 and bool(torch.var(logs) / (torch.mean(logs) ** 2 + 1e-12) > 0.3)


def ace(base, models, *, ridge=0.01, normalize="auto", refine=0.3, center=True, **other):
    deltas = [delta for delta in vectors(base, models) if delta.any()]
    if not deltas:
        return base.double()
    rows, columns = base.shape
    flag = heterogeneous(deltas, normalize)
    eye = torch.eye(columns, dtype=torch.float64)
    mean_trace = sum(torch.trace(delta.T @ delta) for delta in deltas) / len(deltas)
    centred = [delta - delta.mean(dim=0, keepdim=True) if center and rows > 1 else delta for delta in deltas]
    plain, shifted = [], []
    for d in centred:
        sigma = d.T @ d
        trace = torch.trace(sigma) + 1e-12 if flag else 1.0
        plain.append(sigma / trace)
        shifted.append(sigma / trace + ridge / trace * eye)
    prior = sum(plain).mean(dim=0, keepdim=True) / (mean_trace + 1e-12 if flag else 1.0)
    a = sum(shifted) + torch.ones(columns, 1, dtype=torch.float64) @ prior
    w = sum(d @ s for d, s in zip(centred, shifted, strict=True)) @ torch.linalg.inv(a)
    if flag:
        mean = sum(shifted) / len(shifted)
        r = sum(d @ (s - mean) for d, s in zip(centred, plain, strict=True)) + w
        u, s, v = triplets(r, k=int(min(rows, columns) * refine))
        if len(s):
            w = w + s.mean() * u @ v.T
    return base.double() + other.get("lambda", 1.0) * w
