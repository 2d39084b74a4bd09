"""Weights of models in an average: numbers from 0 to 1 that add up to 1."""

from __future__ import annotations

import torch
from torch import Tensor


def shares(amount: Tensor) -> Tensor:
    """Divide amounts by their sum; if all are 0, return equal shares.

    Args:
        amount: Non-negative, shape [T], float64.
    """
    largest = amount.max()
    some = largest > 0
    # divide by the largest first, because the sum of large amounts may overflow
    relative = amount / torch.where(some, largest, 1.0)
    return torch.where(some, relative / torch.where(some, relative.sum(), 1.0), 1 / len(amount))


def best(score: Tensor, count: int) -> Tensor:
    """Return which models have the highest scores, bool, shape [T]; of equal scores the first models are taken.

    Args:
        score: Shape [T].
        count: Number of models to select; if there are fewer, all.
    """
    place = torch.arange(len(score), device=score.device)
    # row i: the models that rank before model i
    before = (score > score.unsqueeze(1)) | ((score == score.unsqueeze(1)) & (place < place.unsqueeze(1)))
    return before.sum(dim=1) < count
