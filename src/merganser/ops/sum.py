"""Task vectors and weighted sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def deltas(base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
    """Return the task vectors, model minus base."""
    return [model - base for model in models]


def weighted_sum(tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Return `sum_i weight[i] * tensors[i]`, added in order.

    Args:
        tensors: At least one tensor.
        weight: One entry per tensor, shape [T].
    """
    total = tensors[0] * weight[0]
    for i in range(1, len(tensors)):
        total = total + tensors[i] * weight[i]
    return total


def normalizer(total: Tensor) -> Tensor:
    """Return `total`, or 1 where it is 0: a divisor that leaves an empty sum alone."""
    return torch.where(total == 0, torch.ones_like(total), total)
