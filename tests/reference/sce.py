"""Wan et al. 2024, "FuseChat: Knowledge Fusion of Chat Models", section 3.3 (SCE): select, calculate, erase."""

import torch


def select_mask(deltas, topk):
    """Elements with the top variance over the models, as a share of those that vary at all; equal ones all count.

    The variance is E(x^2) - E(x)^2 times the square of the number of models: in whole steps of 16-bit weights, hence
    exact, so that equal ones are found equal.
    """
    variance = len(deltas) * (deltas * deltas).sum(dim=0) - deltas.sum(dim=0) ** 2
    values = variance[variance > 0].sort(descending=True).values
    k = int(topk * len(values))
    return variance >= values[k - 1] if k else torch.zeros_like(variance, dtype=torch.bool)


def sce(base, models, *, select_topk=1.0, select="delta", floor=0.0):
    base = base.double()
    deltas = torch.stack([model.double() - base for model in models])
    selected = deltas * select_mask(deltas, select_topk) if select_topk < 1 else deltas
    # calculate: matrix-level coefficients from squares
    squares = torch.stack([delta.square().mean() for delta in selected])
    if squares.sum() == 0 or squares.sum() < floor:
        eta = torch.full_like(squares, 1 / len(models))
    else:
        eta = squares / squares.sum()
    merged = selected if select == "delta" else deltas
    # erase: the minority sign
    majority = torch.where(merged.sum(dim=0) < 0, -1.0, 1.0).double()
    total, share = torch.zeros_like(base), torch.zeros_like(base)
    for weight, delta in zip(eta, merged, strict=True):
        agrees = torch.sign(delta) == majority
        total += weight * delta * agrees
        share += weight * agrees
    share = share.clamp(min=floor)
    return base + total / torch.where(share == 0, 1.0, share)
