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
from torch import Tensor

from .operators import define

Array = np.ndarray[Any, np.dtype[Any]]

# number of elements that are sorted together, so few that the packed integers fit into the CPU's cache
_CHUNK = 1 << 16

# most bits of a column, for which 32 bits leave room for the exponent and 7 bits of the mantissa
_NARROW = 15


Keys = tuple[Tensor, Tensor]


def by_rank(magnitudes: Tensor, table: Tensor, keys: Keys | None = None) -> Tensor:
    """Return `table[rank]` for every element, where rank is its rank within its row, from 0 for the smallest.

    Args:
        magnitudes: Non-negative values, shape [rows, columns]. Of equal values the first has the lower rank.
        table: Value for each rank, shape [columns].
        keys: From `rank_keys`; with them it takes half the time.

    Returns:
        Shape [rows, columns], in the dtype of the table.
    """
    return _by_rank_op(magnitudes, table, *(keys or (None, None)))


def rank_keys(magnitudes: Tensor) -> Keys | None:
    """Return what `by_rank` sorts, where it can sort integers of 32 bits: float32 on a CPU, in rows that are not too long.

    These are operations on elements, which cost next to nothing in the loop that computes the magnitudes.

    Args:
        magnitudes: Non-negative values, shape [rows, columns].

    Returns:
        The keys, int32, and where they lack bits that are set, bool. From the top a key holds the upper bits of a magnitude,
        whether any of its lower bits is set, and in place of these the column.
    """
    width = _column_bits(magnitudes.shape[1])
    if magnitudes.dtype != torch.float32 or magnitudes.device.type != "cpu" or width > _NARROW:
        return None
    bits = magnitudes.view(torch.int32)
    below = (1 << width) - 1
    lower = bits & below
    column = torch.arange(magnitudes.shape[1], dtype=torch.int32)
    return (bits - lower) * 2 | (lower + below) & (1 << width) | column, lower != 0


def sort_rows(values: Tensor) -> Tensor:
    """Sort every row of a matrix of non-negative values in ascending order; shape [rows, columns]."""
    return _sort_rows_op(values)


def _by_rank(magnitudes: Tensor, table: Tensor, keys: Tensor | None, inexact: Tensor | None) -> Tensor:
    if magnitudes.device.type == "cpu" and magnitudes.dtype == torch.float32:
        return _by_packed_sort(magnitudes, table, keys, inexact)
    columns = magnitudes.sort(dim=1, stable=True).indices
    values = torch.empty_like(magnitudes, dtype=table.dtype)
    return values.scatter_(1, columns, table.expand(columns.shape))


def _sort_rows(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        ordered = values.clone(memory_format=torch.contiguous_format)
        ordered.numpy().sort(axis=-1)
        return ordered
    return values.sort(dim=1).values


def _by_packed_sort(magnitudes: Tensor, table: Tensor, keys: Tensor | None, inexact: Tensor | None) -> Tensor:
    rows, columns = magnitudes.shape
    values = torch.empty((rows, columns), dtype=table.dtype)
    step = max(_CHUNK // max(columns, 1), 1)
    bits = magnitudes.numpy().view(np.uint32)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        order = _columns_in_order(bits[part], *(None if own is None else own[part].numpy() for own in (keys, inexact)))
        values[part].scatter_(1, torch.from_numpy(order), table.expand(order.shape))
    return values


def _columns_in_order(bits: Array, keys: Array | None, inexact: Array | None) -> Array:
    """Return the columns of each row in the order of their entries, int64."""
    if keys is None or inexact is None or 8 * np.count_nonzero(inexact) > inexact.size:
        # of most differences of 32-bit weights the lower bits are set
        return _columns_in_64_bits(bits)
    order, left = _columns_in_32_bits(keys.view(np.uint32), inexact)
    if len(left):
        order[left] = _columns_in_64_bits(bits[left])
    return order


def _column_bits(columns: int) -> int:
    return max(columns - 1, 0).bit_length()


def _columns_in_32_bits(keys: Array, inexact: Array) -> tuple[Array, Array]:
    """Return the columns of each row in the order of their entries, int64, and the rows where it may be another one.

    Args:
        keys: Shape [rows, columns], uint32; from `rank_keys`.
        inexact: Where they lack bits, bool.
    """
    columns = keys.shape[1]
    width = _column_bits(columns)
    places = np.flatnonzero(inexact)
    # entries that lack bits come after those of the same upper bits that do not, but among themselves in no order
    known = ((places // max(columns, 1)) << 32) | (keys.reshape(-1)[places] >> np.uint32(width))
    known.sort()
    left = np.unique(known[1:][known[1:] == known[:-1]] >> 32)
    order = np.sort(keys, axis=-1)
    order &= np.uint32((1 << width) - 1)
    return order.astype(np.int64), left


def _columns_in_64_bits(bits: Array) -> Array:
    """Return the columns of each row in the order of their entries, int64; argument as for `_columns_in_32_bits`."""
    # little-endian: the lower half of an int64 comes first in memory
    halves = np.empty((*bits.shape, 2), dtype=np.uint32)
    halves[:, :, 0] = np.arange(bits.shape[1], dtype=np.uint32)
    halves[:, :, 1] = bits
    packed = halves.view(np.int64).squeeze(-1)
    packed.sort(axis=-1)
    packed &= 0xFFFFFFFF
    return packed


_by_rank_op = define(
    "by_rank(Tensor magnitudes, Tensor table, Tensor? keys, Tensor? inexact) -> Tensor",
    _by_rank,
    lambda magnitudes, table, keys, inexact: torch.empty_like(magnitudes, dtype=table.dtype),
)
_sort_rows_op = define(
    "sort_rows(Tensor values) -> Tensor",
    _sort_rows,
    lambda values: torch.empty_like(values, memory_format=torch.contiguous_format),
)
