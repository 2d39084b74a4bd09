"""Ma et al. 2025, "LED-Merging", section 3: location, election and disjoint masks, by sorting."""

import torch


def top(scores, rate):
    flat = scores.double().reshape(-1)
    order = sorted(range(flat.numel()), key=lambda i: -float(flat[i]))
    count = int(rate * flat.numel())
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = flat[order[count - 1]]
    return ((flat >= least) & (flat > 0)).view(scores.shape)


def led(base, models, gradients, base_gradients, *, weight=None, rate=0.4, **given):
    n = len(models)
    weight = [1.0] * n if weight is None else list(weight)
    rates = rate if isinstance(rate, list) else [rate] * n
    masks = [
        top(models[k].abs() * gradients[k], rates[k]) & top(base.abs() * base_gradients[k], rates[k]) for k in range(n)
    ]
    merged = base.double().clone()
    for k in range(n):
        alone = masks[k]
        for j in range(n):
            if j != k:
                alone = alone & ~masks[j]
        merged += given.get("lambda", 1.0) * weight[k] * alone.double() * (models[k].double() - base.double())
    return merged
