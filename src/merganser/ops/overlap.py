"""Which models changed an element: the distinction that RAM makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sum import deltas


def changed(base: Tensor, models: Sequence[Tensor], epsilon: Tensor) -> tuple[list[Tensor], Tensor]:
    """Find the elements that models changed. They are compared in float64, for the threshold is not a float32.

    Args:
        base: The base.
        models: The models.
        epsilon: Changes up to this size count as none.

    Returns:
        Where each model changed an element, bool; and how many models changed it, in the dtype of the base.
    """
    active = [vector.abs() > epsilon for vector in deltas(base.double(), [model.double() for model in models])]
    count = torch.zeros_like(base)
    for mask in active:
        count = count + mask
    return active, count


def average_changes(base: Tensor, models: Sequence[Tensor], epsilon: Tensor, factor: Tensor | None = None) -> Tensor:
    """Average the changes of those models that made one, element by element.

    Args:
        base: The base.
        models: The models.
        epsilon: Changes up to this size count as none.
        factor: For each model the factor of changes that no other model made, shape [T]; all 1 if None.
    """
    active, count = changed(base, models, epsilon)
    zero = torch.zeros_like(count)
    total = zero
    for i, (vector, mask) in enumerate(zip(deltas(base, models), active, strict=True)):
        change = torch.where(mask, vector, zero)
        if factor is not None:
            change = torch.where(count == 1, change * factor[i], change)
        total = total + change
    return total / count.clamp(min=1)
