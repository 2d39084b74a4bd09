"""Which models changed an element, as RAM distinguishes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sum import deltas, round_down


def changed(base: Tensor, models: Sequence[Tensor], epsilon: Tensor) -> tuple[list[Tensor], Tensor]:
    """Find the elements that each model changed.

    Args:
        base: The base.
        models: The models.
        epsilon: Changes up to this size count as none.

    Returns:
        Where each model changed an element, bool; and the number of models that changed it, in the dtype of the base.
    """
    # for x of the dtype of the base: x > epsilon exactly where x > threshold
    threshold = round_down(epsilon, base.dtype)
    active = [vector.abs() > threshold for vector in deltas(base, models)]
    count = torch.zeros_like(base)
    for mask in active:
        count = count + mask
    return active, count


def average_changes(base: Tensor, models: Sequence[Tensor], epsilon: Tensor, factor: Tensor | None = None) -> Tensor:
    """Average, for each element, the changes of the models that changed it.

    Args:
        base: The base.
        models: The models.
        epsilon: Changes up to this size count as none.
        factor: Factors of each model for elements that no other model changed, shape [T]; all 1 if None.
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
