"""Descriptions of named tensors of a checkpoint: dtype, shape, and where the bytes are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from .dtypes import DType

__all__ = ["Source", "TensorInfo", "renamed"]


class Source(Protocol):
    """A reader of tensors whose bytes are not stored in one contiguous range of a file."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of the row-major tensor `name`, beginning at byte `start` of the tensor."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A named tensor on disk, known from the file's header alone.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: the element type.
        shape: the shape; `()` for a scalar.
        file: the file that holds it.
        offset: the first byte in `file`, or -1 if the bytes must be read through `source`.
        nbytes: the size in bytes.
        source: reads the bytes if they are not at a plain offset (`.bin` files).
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    source: Source | None = field(default=None, repr=False, compare=False)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Renamed:
    """Reads a tensor under its original name in the file."""

    source: Source
    name: str

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self.source.read_into(self.name, start, buffer)


def renamed(tensor: TensorInfo, name: str) -> TensorInfo:
    """Return the same bytes of the same file under another name."""
    if name == tensor.name:
        return tensor
    source = None if tensor.source is None else _Renamed(tensor.source, tensor.name)
    return replace(tensor, name=name, source=source)
