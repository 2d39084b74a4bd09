"""Tensors that are rows of a larger one: an expert of a stack of matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..tensor import ByteReader, TensorInfo

__all__ = ["matrix_of"]


@dataclass(frozen=True, slots=True)
class _Part:
    """The source of a range of a tensor's bytes."""

    whole: TensorInfo
    first: int

    def read_into(self, reader: ByteReader, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of the part, beginning at byte `start`."""
        reader.read_into(self.whole, self.first + start, buffer)


def matrix_of(stack: TensorInfo, number: int, rows: range, name: str) -> TensorInfo:
    """Return some rows of one matrix of a stack as a tensor; nothing is read until it is.

    Args:
        stack: Shape [matrices, rows, columns].
        number: Which matrix.
        rows: Which of its rows.
        name: Name of the tensor.
    """
    _, height, width = stack.shape
    row = width * stack.dtype.itemsize
    first = (number * height + rows.start) * row
    shape, nbytes = (len(rows), width), len(rows) * row
    if stack.source is None:
        return replace(stack, name=name, shape=shape, offset=stack.offset + first, nbytes=nbytes)
    # the rounding errors of quantised values are known from the first element of the stack on
    return replace(
        stack,
        name=name,
        shape=shape,
        nbytes=nbytes,
        source=_Part(stack, first),
        stored=stack.stored or (stack,),
        noise=None,
    )
