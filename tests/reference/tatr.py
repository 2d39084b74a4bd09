"""Sun et al. 2025, "Task Arithmetic in Trust Region", zero-shot: the task vector replaces the gradient.

Omega = sum_{i != j} |delta_i| o |delta_j|; the threshold is the value at position floor(q * n) of Omega in ascending
order; elements of smaller Omega are merged by task arithmetic. Elements with Omega = 0 always are.
"""

import torch


def tatr(base, models, *, weight=1.0, quantile=0.99, trim_over="model", **other):
    weight = weight if isinstance(weight, list) else [weight] * len(models)
    base = base.double()
    deltas = [model.double() - base for model in models]
    omega = torch.zeros_like(base)
    for i, own in enumerate(deltas):
        for j, foreign in enumerate(deltas):
            if i != j:
                omega += own.abs() * foreign.abs()
    ascending = omega.flatten().sort().values
    place = int(quantile * len(ascending))
    inside = torch.ones_like(omega, dtype=torch.bool)
    if place < len(ascending):
        inside = (omega < ascending[place]) | (omega == 0)
    merged = base.clone()
    for factor, delta in zip(weight, deltas, strict=True):
        merged += other.get("lambda", 1.0) * factor * delta * inside
    return merged
