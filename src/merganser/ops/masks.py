"""Rules that find what belongs to a task in a sum of task vectors: TALL masks, and what EMR elects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sum import not_negative


def tall_mask(vector: Tensor, total: Tensor, threshold: Tensor) -> Tensor:
    """Say where a task's own change outweighs what the other tasks add to it, bool.

        mask = |vector| > threshold * |total - vector|

    It is decided in float64: with weights of 16 bits the two sides are often equal, and rounding would choose.

    Args:
        vector: The task vector.
        total: The merged task vector; what `vector` was added to in float64 is best handed in like that.
        threshold: lambda of the TALL masks, 0-d.
    """
    own = vector.double()
    return ~not_negative(threshold * (total - own).abs() - own.abs())


def elect_largest(vectors: Sequence[Tensor]) -> Tensor:
    """Return EMR's elected task vector: the sign of the sum, and the largest magnitude among the entries of that sign.

    The sum is formed in float64; where it is exactly 0, the sign is minus.

    Args:
        vectors: At least one task vector.
    """
    total = vectors[0].double()
    for vector in vectors[1:]:
        total = total + vector
    positive = ~not_negative(-total)
    largest = torch.zeros_like(vectors[0])
    for vector in vectors:
        largest = torch.maximum(largest, torch.where(positive, vector, -vector))
    return torch.where(positive, largest, -largest)
