"""Tensors that are computed while they are read: dequantised values, a base with an adapter added.

A format gives a `Rows`: how to compute some rows of the tensor from stored tensors. `derive` makes a `TensorInfo` of it,
which the engine reads like any other; values come in a wide dtype, a few hundred thousand at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..dtypes import DTYPES, DType
from ..tensor import ByteReader, Noise, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rows", "derive", "read_columns", "read_elements", "read_rows", "read_whole", "rows_of"]

_SLAB = 1 << 19
"""Elements computed at a time: the size of the engine's blocks."""

_F32 = DTYPES["F32"]
_PIECE = 4096
"""Bytes; pieces of columns that are shorter are read together with what lies between them."""

_SPAN = 4 << 20
"""Bytes read at a time to take columns out of them."""


class Rows(Protocol):
    """Computes rows of a tensor. It must be safe to use from many threads, and picklable for a cluster."""

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return rows in the tensor's dtype, shape [end - first, width].

        Args:
            reader: Reads the stored tensors.
            first: The first row; rows are those of the tensor with all dimensions but the last flattened.
            end: The row after the last.

        Raises:
            CheckpointError: A file cannot be read.
        """


@dataclass(frozen=True, slots=True)
class _Computed:
    """The source of a derived tensor."""

    rows: Rows
    width: int
    size: int

    def read_into(self, reader: ByteReader, name: str, start: int, buffer: memoryview) -> None:
        import torch

        size, width = self.size, self.width
        found = torch.frombuffer(buffer, dtype=torch.uint8)
        at, end = start, start + len(buffer)
        step = max(1, _SLAB // width)
        while at < end:
            first = at // (size * width)
            last = min(first + step, -(-end // (size * width)))
            values = self.rows(reader, first, last).contiguous().reshape(-1).view(torch.uint8)
            skip = at - first * size * width
            upto = min(last * size * width, end)
            found[at - start : upto - start] = values[skip : skip + upto - at]
            at = upto


def derive(
    name: str,
    shape: tuple[int, ...],
    stored: Sequence[TensorInfo],
    rows: Rows,
    *,
    natural: DType,
    noise: Noise | None = None,
    dtype: DType = _F32,
) -> TensorInfo:
    """Return a tensor whose values `rows` computes when they are read.

    Args:
        name: Its name in the checkpoint.
        shape: Its shape.
        stored: The tensors of the files that it is computed from. The first one's file counts as its file: the record
            tells inputs apart by file and name, so it must be one that no other input has under this name.
        rows: Computes its rows; a tensor of one dimension is a single row.
        natural: The dtype in which an output stores it by default.
        noise: For dequantised values, how far rounding to the grid may have moved them.
        dtype: The dtype of the computed values.
    """
    return TensorInfo(
        name,
        dtype,
        shape,
        stored[0].file,
        -1,
        dtype.nbytes(math.prod(shape)),
        source=_Computed(rows, max(1, shape[-1] if shape else 1), dtype.itemsize),
        stored=tuple(stored),
        natural=natural,
        noise=noise,
    )


def rows_of(tensor: TensorInfo) -> Rows | None:
    """Return what computes the rows of a derived tensor; None for any other."""
    return tensor.source.rows if isinstance(tensor.source, _Computed) else None


def read_rows(reader: ByteReader, tensor: TensorInfo, first: int, end: int) -> Tensor:
    """Read rows of a stored tensor in its own dtype, shape [end - first, width]; one dimension is a single row."""
    width = tensor.shape[-1] if tensor.shape else 1
    return read_elements(reader, tensor, first * width, end * width).view(end - first, width)


def read_elements(reader: ByteReader, tensor: TensorInfo, first: int, end: int) -> Tensor:
    """Read a range of a stored tensor's elements in its own dtype, flat."""
    import torch

    size = tensor.dtype.itemsize
    memory = torch.empty((end - first) * size, dtype=torch.uint8)
    reader.read_into(tensor, first * size, memory.numpy().data)
    return memory.view(getattr(torch, tensor.dtype.name))


def read_whole(reader: ByteReader, tensor: TensorInfo) -> Tensor:
    """Read a whole stored tensor, in its own dtype and shape."""
    return read_elements(reader, tensor, 0, tensor.numel).view(tensor.shape)


def read_columns(reader: ByteReader, tensor: TensorInfo, rows: range, columns: range) -> Tensor:
    """Read consecutive columns of consecutive rows of a stored tensor, in its own dtype.

    Args:
        reader: Reads the file.
        tensor: The tensor; all dimensions but the last count as rows.
        rows: The rows.
        columns: The columns.

    Returns:
        Shape [len(rows), len(columns)].
    """
    import torch

    width = tensor.shape[-1]
    found = torch.empty(len(rows), len(columns), dtype=getattr(torch, tensor.dtype.name))
    if len(columns) * tensor.dtype.itemsize >= _PIECE:
        for i, row in enumerate(rows):
            start = row * width + columns.start
            found[i] = read_elements(reader, tensor, start, start + len(columns))
        return found
    step = max(1, _SPAN // (width * tensor.dtype.itemsize))
    for at in range(0, len(rows), step):
        upto = min(at + step, len(rows))
        found[at:upto] = read_rows(reader, tensor, rows[0] + at, rows[0] + upto)[:, columns.start : columns.stop]
    return found
