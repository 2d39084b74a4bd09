"""Adam, for methods whose publication defines the result by a number of its steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FIRST, _SECOND, _EPSILON = 0.9, 0.999, 1e-8


def adam(gradient: Callable[[Tensor], Tensor], start: Tensor, steps: int, learning_rate: float) -> Tensor:
    """Minimise a function by Adam (Kingma and Ba, 2015), with the usual constants and no weight decay.

    Args:
        gradient: Returns the gradient at a point.
        start: The first point; it is not modified.
        steps: Number of steps.
        learning_rate: Approximate length of a step in each element, independent of the size of the gradient.

    Returns:
        The point after the last step.
    """
    point, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        slope = gradient(point)
        mean.mul_(_FIRST).add_(slope * (1 - _FIRST))
        square.mul_(_SECOND).add_(slope.square_().mul_(1 - _SECOND))
        spread = (square / (1 - _SECOND**step)).sqrt_().add_(_EPSILON)
        point.sub_((mean / spread).mul_(learning_rate / (1 - _FIRST**step)))
    return point
