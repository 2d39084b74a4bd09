"""Ranks within rows, which need a sort.

On a CPU each magnitude's bits and its column are packed into one integer. A sort of values alone, which unlike an
argsort uses vector instructions, then gives the columns in order, too. Integers of 32 bits are sorted twice as fast as
those of 64. They have room for the column and the upper bits of the magnitude, which are all there is of most differences
of 16-bit weights; rows where the lower bits matter are sorted again, in 64 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .operators import define

Array = NDArray[Any]

# number of elements that are sorted together, so few that the packed integers fit into the CPU's cache
_CHUNK = 1 << 16

# most bits of a column, for which 32 bits leave room for the exponent and 7 bits of the mantissa
_NARROW = 15


def by_rank(magnitudes: Tensor, table: Tensor, keys: Tensor | None = None) -> Tensor:
    """Return `table[rank]` for every element, where rank is its rank within its row, from 0 for the smallest.

    Args:
        magnitudes: Non-negative values, shape [rows, columns]. Of equal values the first has the lower rank.
        table: Value for each rank, shape [columns].
        keys: From `rank_keys`; with them it takes half the time.

    Returns:
        Shape [rows, columns], in the dtype of the table.
    """
    below = (1 << _column_bits(magnitudes.shape[1])) - 1
    return _place_op(_order_op(magnitudes, keys) & below, table)


def rank_keys(magnitudes: Tensor) -> Tensor | None:
    """Return what `by_rank` sorts, where it can sort integers of 32 bits: float32 on a CPU, in rows that are not too long.

    These are operations on elements, which cost next to nothing in the loop that computes the magnitudes.

    Args:
        magnitudes: Non-negative values, shape [rows, columns].

    Returns:
        The keys, int32. From the top a key holds the upper bits of a magnitude, whether any of its lower bits is set, and
        in place of these the column.
    """
    width = _column_bits(magnitudes.shape[1])
    if magnitudes.dtype != torch.float32 or magnitudes.device.type != "cpu" or width > _NARROW:
        return None
    bits = magnitudes.view(torch.int32)
    below = (1 << width) - 1
    lower = bits & below
    column = torch.arange(magnitudes.shape[1], dtype=torch.int32)
    return (bits - lower) * 2 | (lower + below) & (1 << width) | column


def sort_rows(values: Tensor) -> Tensor:
    """Sort every row of a matrix of non-negative values in ascending order; shape [rows, columns]."""
    return _sort_rows_op(values)


def _order(magnitudes: Tensor, keys: Tensor | None) -> Tensor:
    """Return the columns of each row in the order of their entries, in the lower bits of int32."""
    if magnitudes.device.type != "cpu" or magnitudes.dtype != torch.float32:
        return magnitudes.sort(dim=1, stable=True).indices.int()
    rows, columns = magnitudes.shape
    order = np.empty((rows, columns), dtype=np.uint32)
    step = max(_CHUNK // max(columns, 1), 1)
    bits = magnitudes.numpy().view(np.uint32)
    narrow = None if keys is None else keys.numpy().view(np.uint32)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        _sort_keys(bits[part], None if narrow is None else narrow[part], order[part])
    return torch.from_numpy(order.view(np.int32))


def _place(order: Tensor, table: Tensor) -> Tensor:
    """Put the j-th entry of a table where the j-th column in the order of a row is; every column is there once."""
    values = torch.empty_like(order, dtype=table.dtype)
    return values.scatter_(1, order.long(), table.expand(order.shape))


def _sort_rows(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        ordered = values.clone(memory_format=torch.contiguous_format)
        ordered.numpy().sort(axis=-1)
        return ordered
    return values.sort(dim=1).values


def _sort_keys(bits: Array, keys: Array | None, order: Array) -> None:
    """Put the columns of each row in the order of their entries.

    Args:
        bits: Those of the magnitudes, uint32, shape [rows, columns].
        keys: From `rank_keys`, as uint32.
        order: Gets the columns in its lower bits, uint32.
    """
    columns = bits.shape[1]
    inexact = np.uint32(1 << _column_bits(columns))
    # most differences of 32-bit weights have their lower bits set, as the first row shows
    if keys is None or not columns or 8 * np.count_nonzero(keys[0] & inexact) > columns:
        order[:] = _columns_in_64_bits(bits)
        return
    order[:] = keys
    order.sort(axis=-1)
    # entries that lack bits come after those of the same upper bits that do not, but among themselves in no order
    after = order[:, 1:]
    unknown = (order[:, :-1] ^ after) < inexact
    unknown &= (after & inexact) != 0
    left = np.flatnonzero(unknown.any(axis=1))
    if len(left):
        order[left] = _columns_in_64_bits(bits[left])


def _column_bits(columns: int) -> int:
    return max(columns - 1, 0).bit_length()


def _columns_in_64_bits(bits: Array) -> Array:
    """Return the columns of each row in the order of their entries, int64; argument as for `_sort_keys`."""
    # little-endian: the lower half of an int64 comes first in memory
    halves = np.empty((*bits.shape, 2), dtype=np.uint32)
    halves[:, :, 0] = np.arange(bits.shape[1], dtype=np.uint32)
    halves[:, :, 1] = bits
    packed = halves.view(np.int64).squeeze(-1)
    packed.sort(axis=-1)
    packed &= 0xFFFFFFFF
    return packed


_order_op = define(
    "order(Tensor magnitudes, Tensor? keys) -> Tensor",
    _order,
    lambda magnitudes, keys: torch.empty_like(magnitudes, dtype=torch.int32, memory_format=torch.contiguous_format),
)
_place_op = define(
    "place(Tensor order, Tensor table) -> Tensor",
    _place,
    lambda order, table: torch.empty_like(order, dtype=table.dtype),
)
_sort_rows_op = define(
    "sort_rows(Tensor values) -> Tensor",
    _sort_rows,
    lambda values: torch.empty_like(values, memory_format=torch.contiguous_format),
)
