"""Read the bytes of tensors, from many files and in many threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import CheckpointError, NotFoundError
from ..jsonfile import os_reason
from ..system import open_binary, read_at
from .descriptors import MAX_OPEN, Descriptors
from .ranges.pieces import PIECE, Pieces
from .tensor import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reader", "fetched_memory"]

# pieces of a stored remote tensor that are kept while values are computed from it: those of columns lie far apart
_PIECES_OF_COMPUTED = 8


def fetched_memory(tensors: Iterable[TensorInfo]) -> int:
    """Return how many bytes of remote files a thread keeps in memory while it reads these tensors block by block."""
    found = 0
    for tensor in tensors:
        pieces = _PIECES_OF_COMPUTED if tensor.stored else 1
        found += sum(min(part.nbytes, pieces * PIECE) for part in tensor.remotes)
    return found * 3 // 2


class Reader:
    """Reads tensors of any number of checkpoints; safe to use from many threads at once.

    Files stay open between reads; when there are too many, the least recently used is closed. Use it as a context
    manager, or call `close`.

    Args:
        max_open_files: The largest number of files that stay open between reads.
        fetched: Bytes of remote tensors that are kept in memory between reads, about; 0 if most is read once and whole.
    """

    def __init__(self, max_open_files: int = MAX_OPEN, *, fetched: int = 0) -> None:
        self._files: Descriptors[Path] = Descriptors(max_open_files)
        self._pieces = Pieces(fetched)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def read_into(self, tensor: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes.

        Args:
            tensor: what to read.
            start: the first byte wanted, counted from the beginning of the tensor.
            buffer: writable and contiguous; its length is the number of bytes to read.

        Raises:
            CheckpointError: the file is shorter than its header promised, or cannot be read.
            UnreachableError: the Hub stopped answering.
            ValueError: the range is not inside the tensor.
        """
        if not buffer.nbytes:
            return
        target = buffer.cast("B")
        if start < 0 or start + len(target) > tensor.nbytes:
            raise ValueError(f"{tensor.name!r}: bytes {start}..{start + len(target)} of a tensor of {tensor.nbytes}")
        if tensor.source is not None:
            tensor.source.read_into(self, tensor.name, start, target)
            return
        if tensor.remote is not None:
            self._pieces.read_into(tensor.remote, tensor.offset, tensor.nbytes, start, target)
            return
        offset = tensor.offset + start
        with self._files.lend(tensor.file, lambda: _descriptor(tensor)) as file:
            try:
                count = read_at(file, target, offset)
            except OSError as error:
                raise CheckpointError(
                    f"{tensor.file}: tensor {tensor.name!r}: cannot be read: {os_reason(error)}"
                ) from None
        if count < len(target):
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r}: truncated: the file ends at byte {offset + count}, "
                f"the tensor at byte {tensor.offset + tensor.nbytes}; was the file changed meanwhile?"
            )

    def tensor(self, tensor: TensorInfo) -> Tensor:
        """Read a whole tensor, in its own dtype and shape.

        Raises:
            CheckpointError: the file is shorter than its header promised, or cannot be read.
        """
        import torch

        memory = torch.empty(tensor.nbytes, dtype=torch.uint8)
        self.read_into(tensor, 0, memory.numpy().data)
        return memory.view(getattr(torch, tensor.dtype.name)).view(tensor.shape)

    def will_need(self, tensor: TensorInfo, start: int, nbytes: int) -> None:
        """Advise the system that these bytes of the tensor will be read soon, if the system has a call for it."""
        if nbytes <= 0 or not hasattr(os, "posix_fadvise"):
            return
        if tensor.stored:
            # a range of the values comes from about the same share of what is stored
            for part in tensor.stored:
                at = start * part.nbytes // tensor.nbytes
                self.will_need(part, at, -(-nbytes * part.nbytes // tensor.nbytes))
            return
        if tensor.source is not None or tensor.remote is not None:
            return
        # This is only advice: if the file cannot be read, the read itself raises the error.
        with (
            contextlib.suppress(OSError, CheckpointError),
            self._files.lend(tensor.file, lambda: _descriptor(tensor)) as file,
        ):
            os.posix_fadvise(file, tensor.offset + start, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close all files, each as soon as no thread reads from it."""
        self._files.close()


def _descriptor(tensor: TensorInfo) -> int:
    try:
        return open_binary(tensor.file, os.O_RDONLY)
    except FileNotFoundError:
        raise NotFoundError(f"{tensor.file}: tensor {tensor.name!r}: the file is no longer there") from None
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r}: cannot be read: {os_reason(error)}") from None
