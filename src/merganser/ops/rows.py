"""Ranks within rows, which need a sort.

On a CPU each magnitude's bits and its column are packed into one integer. A sort of values alone, which unlike an
argsort uses vector instructions, then gives the columns in order, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import define

# number of elements that are sorted together, so few that the packed integers fit into the CPU's cache
_CHUNK = 1 << 16


def by_rank(magnitudes: Tensor, table: Tensor) -> Tensor:
    """Return `table[rank]` for every element, where rank is its rank within its row, from 0 for the smallest.

    Args:
        magnitudes: Non-negative values, shape [rows, columns]. Of equal values the first has the lower rank.
        table: Value for each rank, shape [columns].

    Returns:
        Shape [rows, columns], in the dtype of the table.
    """
    return _by_rank_op(magnitudes, table)


def sort_rows(values: Tensor) -> Tensor:
    """Sort every row of a matrix of non-negative values in ascending order; shape [rows, columns]."""
    return _sort_rows_op(values)


def _by_rank(magnitudes: Tensor, table: Tensor) -> Tensor:
    if magnitudes.device.type == "cpu" and magnitudes.dtype == torch.float32:
        return _by_packed_sort(magnitudes, table)
    columns = magnitudes.sort(dim=1, stable=True).indices
    values = torch.empty_like(magnitudes, dtype=table.dtype)
    return values.scatter_(1, columns, table.expand(columns.shape))


def _sort_rows(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        ordered = values.clone(memory_format=torch.contiguous_format)
        ordered.numpy().sort(axis=-1)
        return ordered
    return values.sort(dim=1).values


def _by_packed_sort(magnitudes: Tensor, table: Tensor) -> Tensor:
    rows, columns = magnitudes.shape
    values = torch.empty((rows, columns), dtype=table.dtype)
    step = max(_CHUNK // max(columns, 1), 1)
    # little-endian: the lower half of an int64 comes first in memory
    halves = torch.empty((min(step, rows), columns, 2), dtype=torch.int32)
    packed = halves.view(torch.int64).squeeze(-1)
    column = torch.arange(columns, dtype=torch.int32)
    bits = magnitudes.view(torch.int32)
    for start in range(0, rows, step):
        part = bits[start : start + step]
        n = len(part)
        halves[:n, :, 0] = column
        halves[:n, :, 1] = part
        packed[:n].numpy().sort(axis=-1)
        values[start : start + n].scatter_(1, packed[:n].bitwise_and_(0xFFFFFFFF), table.expand(n, columns))
    return values


_by_rank_op = define(
    "by_rank(Tensor magnitudes, Tensor table) -> Tensor",
    _by_rank,
    lambda magnitudes, table: torch.empty_like(magnitudes, dtype=table.dtype),
)
_sort_rows_op = define(
    "sort_rows(Tensor values) -> Tensor",
    _sort_rows,
    lambda values: torch.empty_like(values, memory_format=torch.contiguous_format),
)
