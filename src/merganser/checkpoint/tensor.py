"""Where one named tensor of a checkpoint lies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .dtypes import DType

__all__ = ["Source", "TensorInfo"]


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
