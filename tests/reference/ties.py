"""Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", algorithm 1.

With a weight for each task vector, in the vote (elect) and in the mean (merge). Trimming is per tensor.
"""

import math

import torch


def keep_topk(vector, density):
    """Step 1, for one task vector: keep the top k values, reset the others to 0; all of equal magnitude are kept."""
    k = max(math.floor(density * vector.numel()), 1)
    if density == 0:
        return torch.zeros_like(vector)
    threshold = vector.abs().reshape(-1).sort(descending=True).values[k - 1]
    return vector * (vector.abs() >= threshold)


def elect_and_merge(vectors, weight, normalize):
    """Steps 2 and 3: gamma = sgn(sum_t tau_t), then the mean over A = {t : sgn(tau_t) = gamma}."""
    weighted = [w * vector for w, vector in zip(weight, vectors, strict=True)]
    gamma = torch.where(sum(weighted) < 0, -1.0, 1.0).double()
    members = [torch.sign(vector) == gamma for vector in weighted]
    total = sum(vector * member for vector, member in zip(weighted, members, strict=True))
    if not normalize:
        return total
    count = sum(w * member.double() for w, member in zip(weight, members, strict=True))
    return total / torch.where(count == 0, 1.0, count)


def ties(base, models, *, weight, density=None, normalize=True, rescale=False, trim_over="tensor", **other):
    assert trim_over == "tensor" or len(models[0].shape) == 1
    base = base.double()
    vectors = [model.double() - base for model in models]
    density = density or [1.0] * len(models)
    trimmed = [keep_topk(vector, d) for vector, d in zip(vectors, density, strict=True)]
    if rescale:
        sums = [(float(v.abs().sum()), float(t.abs().sum())) for v, t in zip(vectors, trimmed, strict=True)]
        trimmed = [t * (v / s if min(v, s) >= 1e-7 else 1) for t, (v, s) in zip(trimmed, sums, strict=True)]
    return base + other.get("lambda", 1.0) * elect_and_merge(trimmed, weight, normalize)
