"""Low-rank factors of a matrix, of a given rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .spectral import Svd, svd

# added before rounding down: 0.29 * 100 is 28.999999999999996, but means 29
_ROUNDING = 1e-9


def rank_of(shape: Sequence[int], share: Tensor) -> int:
    """Return the rank that is a share of the largest possible one, rounded down."""
    return int(float(share) * min(shape) + _ROUNDING)


def leading(matrix: Tensor, rank: int) -> Svd:
    """Return exactly `rank` singular triplets, the largest first, padded with zeros if there are fewer.

    Signs are fixed: in each left vector, the entry that is largest in magnitude is positive.

    Args:
        matrix: Shape [m, n].
        rank: At most min(m, n).

    Returns:
        Left vectors [m, rank], singular values [rank], float64, and right vectors [n, rank].
    """
    left, values, right = svd(matrix, rank)
    if left.shape[1]:
        largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
        left, right = left * sign, right * sign
    pad = (0, rank - left.shape[1])
    return Svd(*(torch.nn.functional.pad(part, pad) for part in (left, values, right)))


def factor(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of the best approximation of rank `rank`, left @ right.T, of shapes [m, rank] and [n, rank].

    Both contain the square roots of the singular values, so that their entries are of similar size.
    """
    left, values, right = leading(matrix, rank)
    root = values.sqrt().to(matrix.dtype)
    return left * root, right * root
