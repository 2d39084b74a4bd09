"""Wortsman et al. 2022, "Model soups": the weighted (for equal weights: uniform) soup."""

import torch


def linear(base, models, weight, normalize=True):
    total = torch.zeros_like(models[0], dtype=torch.float64)
    for model, w in zip(models, weight, strict=True):
        total += w * model.double()
    return total / sum(weight) if normalize and sum(weight) != 0 else total
