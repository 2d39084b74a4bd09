"""Rules that find the entries of a task in a sum of task vectors: TALL masks, and the election of EMR."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sum import not_negative


def tall_mask(vector: Tensor, total: Tensor, threshold: Tensor) -> Tensor:
    """Return where the change of one task outweighs the changes of all other tasks, bool.

        mask = |vector| > threshold * |total - vector|

    Compared in float64: for 16-bit weights the two sides are often equal, and rounding would decide.

    Args:
        vector: The task vector.
        total: The merged task vector; if it was summed in float64, pass it without rounding.
        threshold: lambda of the TALL masks, 0-d.
    """
    wide = vector.double()
    return ~not_negative(threshold * (total - wide).abs() - wide.abs())


def elect_largest(vectors: Sequence[Tensor]) -> Tensor:
    """Return EMR's elected task vector: the sign of the sum, with the largest magnitude among entries of that sign.

    The sum is computed in float64; where it is exactly 0, the sign is minus.

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
