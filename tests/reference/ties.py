"""Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", algorithm 1.

With a weight for each task vector, in the vote (elect) and in the mean (merge). The tensor is the whole model.
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


def elect(weighted, tie):
    """gamma = sgn(sum_t tau_t); where that is 0, plus, or the majority's sign as in the authors' code."""
    gamma = torch.sign(sum(weighted))
    plus = tie == "plus" or gamma.sum() > 0
    return torch.where(gamma == 0, 1.0 if plus else -1.0, gamma)


def elect_and_merge(vectors, weight, normalize, tie="plus", merge="sum"):
    """Steps 2 and 3: elect, then the mean (sum, max) over A = {t : sgn(tau_t) = gamma}."""
    weighted = [w * vector for w, vector in zip(weight, vectors, strict=True)]
    gamma = elect(weighted, tie)
    members = [torch.sign(vector) == gamma for vector in weighted]
    if merge == "max":
        entries = torch.stack([v * m for v, m in zip(vectors if normalize else weighted, members, strict=True)])
        return entries.gather(0, entries.abs().argmax(dim=0, keepdim=True))[0]
    total = sum(vector * member for vector, member in zip(weighted, members, strict=True))
    if not normalize:
        return total
    count = sum(w * member.double() for w, member in zip(weight, members, strict=True))
    return total / torch.where(count == 0, 1.0, count)


def ties(base, models, *, weight, density=None, normalize=True, rescale=False, trim_over="tensor", **other):
    base = base.double()
    vectors = [model.double() - base for model in models]
    density = density or [1.0] * len(models)
    trimmed = [keep_topk(vector, d) for vector, d in zip(vectors, density, strict=True)]
    if rescale:
        sums = [(float(v.abs().sum()), float(t.abs().sum())) for v, t in zip(vectors, trimmed, strict=True)]
        trimmed = [t * (v / s if min(v, s) >= 1e-7 else 1) for t, (v, s) in zip(trimmed, sums, strict=True)]
    return base + other.get("lambda", 1.0) * elect_and_merge(
        trimmed, weight, normalize, other.get("tie", "plus"), other.get("merge", "sum")
    )
