"""Yang et al. 2025, "CABS", algorithm 1: for each task vector in turn, mask what is taken, then n:m pruning.

theta = theta_0 + sum_i lambda_i * pruned_i. A row's end that is shorter than m keeps its share, rounded up, or nothing.
"""

import math

import torch


def prune_row(row, n, m, tail):
    """Keep the n largest of every m elements, the later of equal ones."""
    kept = torch.zeros_like(row)
    for start in range(0, len(row), m):
        group = row[start : start + m].tolist()
        count = n if len(group) == m else math.ceil(n * len(group) / m) * (tail == "share")
        order = sorted(range(len(group)), key=lambda j: (abs(group[j]), j), reverse=True)
        for j in order[:count]:
            kept[start + j] = group[j]
    return kept


def cabs(base, models, *, weight=1.0, lambda_=1.0, n=64, m=256, tail="share"):
    weight = weight if isinstance(weight, list) else [weight] * len(models)
    start = base.double()
    rows = start.reshape(1, -1) if start.dim() < 2 else start.flatten(1)
    total = torch.zeros_like(rows)
    taken = torch.zeros_like(rows)
    for w, model in zip(weight, models, strict=True):
        delta = model.double().view_as(rows) - rows
        pruned = torch.stack([prune_row(row, n, m, tail) for row in delta * (1 - taken)])
        taken = ((taken + (pruned != 0)) > 0).double()
        total += w * pruned
    return (rows + lambda_ * total).view(base.shape)
