"""Wei et al. 2026, "OptMerge: Unifying Multimodal LLM Capabilities and Modalities via Model Merging"."""

import torch

from tests.reference.decompositions import vectors
from tests.reference.wudi import first, solve


def truncated(matrix, k):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s[k:] = 0
    return u @ torch.diag(s) @ vh, torch.diag(s) @ vh


def optmerge(
    base, models, *, target="centred", solver="filter", time=300.0, steps=300, learning_rate=1e-5, start="sum", **scale
):
    deltas = vectors(base, models)
    k = max(min(base.shape) // len(deltas), 1)
    mean = sum(deltas) / len(deltas)
    sources = [truncated(delta, k)[1] for delta in deltas]
    if target == "centred":
        targets = [truncated(delta - mean, k)[0] + mean for delta in deltas]
    else:
        targets = [truncated(delta, k)[0] for delta in deltas]
    norms = [delta.norm() for delta in deltas]
    merged = solve(targets, sources, norms, first(deltas, start), solver, time, steps, learning_rate)
    return base.double() + scale.get("lambda", 1.0) * merged
