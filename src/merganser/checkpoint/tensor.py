"""Descriptions of named tensors of a checkpoint: dtype, shape, and where the bytes are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .dtypes import DType
from .ranges.file import RemoteFile

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ByteReader", "Noise", "Source", "TensorInfo", "matched", "renamed"]


class ByteReader(Protocol):
    """What reads the bytes of stored tensors; `Reader` is one."""

    def read_into(self, tensor: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of the tensor, beginning at byte `start`."""


class Source(Protocol):
    """A reader of tensors whose bytes are not stored in one contiguous range of a file."""

    def read_into(self, reader: ByteReader, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of the row-major tensor `name`, beginning at byte `start` of the tensor.

        A source that computes its values reads what it needs through `reader`.
        """


class Noise(Protocol):
    """The rounding error of values that were stored on a coarse grid."""

    def __call__(self, values: Tensor) -> Tensor:
        """Return the expected square of each value's error.

        Args:
            values: The first elements of the tensor as they are read, flat, float32.
        """


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
        source: reads the bytes if they are not at a plain offset (`.bin` files, computed tensors).
        stored: the tensors of the files that it is computed from; empty if it is stored as it is.
        natural: the dtype in which the model's weights are usually stored, if `dtype` is that of a computation.
        noise: for dequantised values, how far rounding to the grid may have moved them.
        remote: the file of the Hub that the bytes at `offset` are fetched from; `file` is where a copy of it would be.
        own_name: its name in its model, if `name` is that of another model's tensor with which it is merged.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    source: Source | None = field(default=None, repr=False, compare=False)
    stored: tuple[TensorInfo, ...] = field(default=(), repr=False, compare=False)
    natural: DType | None = field(default=None, repr=False, compare=False)
    noise: Noise | None = field(default=None, repr=False, compare=False)
    remote: RemoteFile | None = field(default=None, repr=False, compare=False)
    own_name: str | None = field(default=None, repr=False, compare=False)

    @property
    def name_in_model(self) -> str:
        """Its name in its model, by which statistics of that model know it."""
        return self.own_name or self.name

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def place(self) -> tuple[tuple[Path, ...], str]:
        """What tells it from other tensors: the files that its value comes from, and its name."""
        if not self.stored:
            return (self.file,), self.name
        return tuple(dict.fromkeys([self.file, *(file for part in self.stored for file in part.place[0])])), self.name

    @property
    def nbytes_stored(self) -> int:
        """The bytes that the files hold for it."""
        return sum(part.nbytes for part in self.stored) if self.stored else self.nbytes

    @property
    def remotes(self) -> Sequence[TensorInfo]:
        """The tensors of remote files that it is read from."""
        return [part for part in self.stored or (self,) if part.remote is not None]


@dataclass(frozen=True, slots=True)
class _Renamed:
    """Reads a tensor under its original name in the file."""

    source: Source
    name: str

    def read_into(self, reader: ByteReader, name: str, start: int, buffer: memoryview) -> None:
        self.source.read_into(reader, self.name, start, buffer)


def matched(tensor: TensorInfo, name: str) -> TensorInfo:
    """Return a tensor under the name of another model's tensor with which it is merged; it keeps its own beside it."""
    return replace(renamed(tensor, name), own_name=tensor.name_in_model) if name != tensor.name else tensor


def renamed(tensor: TensorInfo, name: str) -> TensorInfo:
    """Return the same bytes of the same file under another name."""
    if name == tensor.name:
        return tensor
    source = None if tensor.source is None else _Renamed(tensor.source, tensor.name)
    return replace(tensor, name=name, source=source)
