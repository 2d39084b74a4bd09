"""Shares of models in an average: numbers from 0 to 1 that add up to 1."""

from __future__ import annotations

import torch
from torch import Tensor


def shares(amount: Tensor) -> Tensor:
    """Divide amounts by their sum; they are equal where there is nothing to divide.

    Args:
        amount: Not negative, shape [T], float64.
    """
    largest = amount.max()
    some = largest > 0
    # relative to the largest, as the sum of large amounts may be infinite
    relative = amount / torch.where(some, largest, 1.0)
    return torch.where(some, relative / torch.where(some, relative.sum(), 1.0), 1 / len(amount))


def best(score: Tensor, count: int) -> Tensor:
    """Say which models have the highest scores, bool, shape [T]; of equal ones the first count.

    Args:
        score: Shape [T].
        count: How many are wanted; all models where there are fewer.
    """
    place = torch.arange(len(score), device=score.device)
    # row i: who comes before model i
    before = (score > score.unsqueeze(1)) | ((score == score.unsqueeze(1)) & (place < place.unsqueeze(1)))
    return before.sum(dim=1) < count
