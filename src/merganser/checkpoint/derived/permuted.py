"""Tensors whose rows or columns are put into another order while they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..tensor import ByteReader, TensorInfo
from .gathered import pick_rows

__all__ = ["permuted"]

Order = npt.NDArray[np.int64]

_SLAB = 1 << 19
"""Elements computed at a time: the size of the engine's blocks."""


def permuted(tensor: TensorInfo, orders: Mapping[int, Order]) -> TensorInfo:
    """Return a tensor with other orders along its axes; nothing is read until it is.

    Args:
        tensor: Of any number of dimensions.
        orders: By axis, the first or the last one, which index of the tensor each index of the result is.
    """
    if not orders:
        return tensor
    width = tensor.shape[-1]
    last = len(tensor.shape) - 1
    rows = orders.get(0) if last else None
    if rows is not None and last > 1:
        # all dimensions but the last count as rows
        each = math.prod(tensor.shape[1:-1])
        rows = (rows[:, None] * each + np.arange(each)).reshape(-1)
    source = _Permuted(tensor, np.arange(tensor.numel // width) if rows is None else rows, orders.get(last))
    # the rounding errors of quantised values are known in the stored order only
    return replace(
        tensor, offset=-1, source=source, stored=tensor.stored or (tensor,), natural=tensor.natural, noise=None
    )


@dataclass(frozen=True, eq=False)
class _Permuted:
    """The source of a permuted tensor."""

    tensor: TensorInfo
    rows: Order
    columns: Order | None

    def read_into(self, reader: ByteReader, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of the tensor, beginning at byte `start`."""
        import torch

        width = self.tensor.shape[-1]
        row = width * self.tensor.dtype.itemsize
        found = torch.frombuffer(buffer, dtype=torch.uint8)
        step = max(1, _SLAB // width)
        at, end = start, start + len(buffer)
        while at < end:
            first = at // row
            last = min(first + step, -(-end // row))
            values = pick_rows(reader, self.tensor, self.rows[first:last], width)
            if self.columns is not None:
                values = values[:, torch.from_numpy(self.columns)]
            flat = values.contiguous().reshape(-1).view(torch.uint8)
            skip, upto = at - first * row, min(last * row, end)
            found[at - start : upto - start] = flat[skip : skip + upto - at]
            at = upto
