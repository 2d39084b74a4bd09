"""Count small whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .operators import define

Array = NDArray[Any]


def count(codes: Sequence[Tensor], bins: int, *, few: bool = False) -> Tensor:
    """Count how often each number occurs.

    Args:
        codes: S tensors of any shape, int16, int32 or int64, each entry below `bins`.
        bins: Number of bins.
        few: Most entries are negative, and these are not counted; otherwise none may be negative.

    Returns:
        Shape [S, bins], int64.
    """
    return _count_op(list(codes), bins, few)


def _count(codes: Sequence[Tensor], bins: int, few: bool) -> Tensor:
    counts = torch.zeros(len(codes), bins, dtype=torch.int64, device=codes[0].device)
    for own, total in zip(codes, counts, strict=True):
        flat = own.reshape(-1)
        if few and own.device.type == "cpu":
            # for few values faster than bincount, which allocates a whole histogram
            np.add.at(total.numpy(), not_negative_entries(flat.numpy()), 1)
        else:
            total += torch.bincount(flat[flat >= 0] if few else flat, minlength=bins)
    return counts


def not_negative_entries(values: Array) -> Array:
    """Return the entries that are not negative, in their order; most are negative."""
    inside = values >= 0
    few = np.count_nonzero(inside)
    # np.flatnonzero searches for single True values if fewer than a tenth are True, which is slower than a plain scan
    # from a fortieth on: appended True values make it scan
    rest = len(values) // 9 if 40 * few > len(values) >= 10 * few else 0
    padded = np.concatenate([inside, np.ones(rest, dtype=bool)]) if rest else inside
    return values[np.flatnonzero(padded)[:few]]


_count_op = define(
    "count(Tensor[] codes, int bins, bool few) -> Tensor",
    _count,
    lambda codes, bins, few: codes[0].new_empty(len(codes), bins, dtype=torch.int64),
)
