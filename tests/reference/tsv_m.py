"""Gargiulo et al. 2025, "Task Singular Vectors", section 3.3 and algorithm 1 (TSV-Merge)."""

import torch

from tests.reference.decompositions import nearest_orthonormal, triplets, vectors


def merge_truncated(deltas, ranks, scales):
    parts = [triplets(delta, k) for delta, k in zip(deltas, ranks, strict=True)]
    sigma = torch.cat([scale * s for scale, (_, s, _) in zip(scales, parts, strict=True)])
    u = nearest_orthonormal(*(u for u, _, _ in parts))
    v = nearest_orthonormal(*(v for _, _, v in parts))
    return u @ torch.diag(sigma) @ v.T


def tsv_m(base, models, *, weight=1.0, **other):
    n = len(models)
    k = max(min(base.shape) // n, 1)
    merged = merge_truncated(vectors(base, models, weight), [k] * n, [1.0] * n)
    return base.double() + other.get("lambda", 1.0) * merged
