"""Points on the arc between two tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError


def check_directions(norms: Tensor, names: Sequence[str] = ()) -> None:
    """Refuse zero tensors if others are not zero: they have no direction, so no arc leads from or to them.

    Args:
        norms: Norm of each input, shape [T]. If all are 0, the result is 0 and nothing is refused.
        names: Names of the inputs in messages; by default "model 0", ...

    Raises:
        CheckpointError: An input is 0, and another is not.
    """
    empty = (norms == 0).nonzero().flatten().tolist()
    if 0 < len(empty) < len(norms):
        name = names[empty[0]] if names else f"model {empty[0]}"
        raise CheckpointError(
            f"{name} is all zeros here, which have no direction on the sphere, and other inputs are not; merge "
            "this model by another method, such as linear"
        )


def arc(cosine: Tensor, t: Tensor, straight: Tensor) -> Tensor:
    """Return the factors by which `along` interpolates between two tensors on an arc.

    Args:
        cosine: Cosine of the angle between the tensors, float64, of any shape.
        t: Position: 0 is the first tensor, 1 the second.
        straight: True where to interpolate linearly, bool, in the shape of `cosine`.

    Returns:
        Shape [3, *cosine.shape]: factors of the first tensor, of the second, and of second minus first.
    """
    angle = torch.arccos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
    second = torch.where(straight, t, torch.sin(t * angle) / sine)
    both = torch.where(straight, 1.0, torch.cos((t - 0.5) * angle) / torch.cos(angle / 2))
    beyond = t > 0.5
    zero = torch.zeros_like(both)
    return torch.stack(
        [torch.where(beyond, zero, both), torch.where(beyond, both, zero), torch.where(beyond, -first, second)]
    )


def along(first: Tensor, second: Tensor, factors: Tensor) -> Tensor:
    """Return the point on the arc, computed from the nearer end, so that both ends and equal tensors are exact.

    Args:
        first: The tensor at t = 0.
        second: The tensor at t = 1.
        factors: From `arc`.
    """
    return first * factors[0] + second * factors[1] + (second - first) * factors[2]
