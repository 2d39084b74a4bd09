"""Where one named tensor of a checkpoint lies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from .dtypes import DType

__all__ = ["Source", "TensorInfo", "renamed"]


class Source(Protocol):
    """A file whose tensors cannot be read at a plain byte offset."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of the row-major tensor `name` from byte `start` on."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A named tensor on disk, known from the file's header alone.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: the element type.
        shape: the shape; `()` for a scalar.
        file: the file that holds it.
        offset: the first byte in `file`, or -1 where `source` must be asked.
        nbytes: the size in bytes.
        source: who reads the bytes when a plain offset does not say it (`.bin` files).
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
    """Reads a tensor by the name that it has in its file."""

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
