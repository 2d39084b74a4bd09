"""Means, and paired differences with intervals."""

import math

import torch

__all__ = ["mean", "paired"]


def mean(values: list[float]) -> float:
    """Return the mean; nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def paired(own: list[float], other: list[float], resamples: int = 4000) -> dict[str, float]:
    """Return the mean of differences item by item, and its 95 % bootstrap interval over items.

    The interval of one item is that item, and says nothing.

    Args:
        own: A number per item.
        other: Those of what it is compared with, item by item.
        resamples: Draws of the bootstrap, from a fixed seed.
    """
    difference = torch.tensor(own, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    drawn = torch.randint(len(own), (resamples, len(own)), generator=torch.Generator().manual_seed(0))
    means = difference[drawn].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"more": float(difference.mean()), "low": low, "high": high}
