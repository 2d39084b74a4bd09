"""Zeng et al. 2025, "RobustMerge", section 4, on factors from singular value decompositions of the task vectors."""

import torch

from tests.reference.decompositions import triplets, vectors


def factors(delta, rank):
    u, s, v = triplets(delta, rank)
    sign = torch.stack([column[column.abs().argmax()].sign() for column in u.T]) if len(s) else s
    return u * sign * s.sqrt(), (v * sign * s.sqrt()).T


def pad(b, a, rank):
    missing = rank - len(a)
    return torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))


def prune(factor, density):
    k = int(factor.numel() * (1 - density))
    return factor if k == 0 else factor * (factor.abs() >= factor.abs().flatten().sort().values[k - 1])


def robust_merge(base, models, *, weight=1.0, rank=128, density=0.2, scale_quantile=0.8, **other):
    weight = weight if isinstance(weight, list) else [weight] * len(models)
    pairs = [factors(delta, rank) for delta in vectors(base, models)]
    r = max(len(a) for _, a in pairs)
    if r == 0:
        return base.double()
    pairs = [pad(b, a, r) for b, a in pairs]
    a_sum, b_sum, s_sum = 0.0, 0.0, 0.0
    for w, (b, a) in zip(weight, pairs, strict=True):
        pruned = prune(a, density)
        s = torch.tensor(
            [float(x.abs().sum() / y.abs().sum()) if y.any() else 0.0 for x, y in zip(a, pruned, strict=True)]
        )
        s = s.double().clamp(min=float(s.sort().values[min(int(r * scale_quantile), r - 1)]))
        a_sum = a_sum + w * pruned
        b_sum = b_sum + w * prune(b, density) * s
        s_sum = s_sum + s
    return base.double() + other.get("lambda", 1.0) * (b_sum / torch.where(s_sum > 0, s_sum, 1.0)) @ a_sum
