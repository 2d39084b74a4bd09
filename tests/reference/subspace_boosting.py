"""Skorobogat et al. 2025, "Subspace-Boosted Model Merging", algorithm 1, on task arithmetic."""

import torch

from tests.reference.decompositions import triplets, vectors


def subspace_boosting(base, models, *, weight=1.0, beta=0.01, normalize=True, rank_tolerance=0.0, **other):
    total = sum(vectors(base, models, weight, cut=rank_tolerance == 0))
    if normalize:
        total = total / (sum(weight) if isinstance(weight, list) else weight * len(models))
    u, s, v = triplets(total, tolerance=rank_tolerance)
    if len(s):
        running, k = 0.0, len(s) - 1
        for index, value in enumerate(s.tolist()):
            running += value
            if running >= beta * float(s.sum()) * (1 - 1e-9):
                k = index
                break
        s = torch.maximum(s, s[k])
    return base.double() + other.get("lambda", 1.0) * u @ torch.diag(s) @ v.T
