"""Which models changed an element: the distinction that RAM makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sum import deltas, round_down


def changed(base: Tensor, models: Sequence[Tensor], epsilon: Tensor) -> tuple[list[Tensor], Tensor]:
    """Find the elements that models changed.

    Args:
        base: The base.
        models: The models.
        epsilon: Changes up to this size count as none.

    Returns:
        Where each model changed an element, bool; and how many models changed it, in the dtype of the base.
    """
    # above the number: above the next one that is rounded down to
    threshold = round_down(epsilon, base.dtype)
    active = [vector.abs() > threshold for vector in deltas(base, models)]
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
