"""Read the bytes of tensors, from many files and in many threads."""

from __future__ import annotations

import contextlib
import os
import threading
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

__all__ = ["MappedFiles", "Reader", "fetched_memory"]

# pieces of a stored remote tensor that are kept while values are computed from it: those of columns lie far apart
_PIECES_OF_COMPUTED = 8


def fetched_memory(tensors: Iterable[TensorInfo]) -> int:
    """Return how many bytes of remote files a thread keeps in memory while it reads these tensors block by block."""
    found = 0
    for tensor in tensors:
        pieces = _PIECES_OF_COMPUTED if tensor.stored else 1
        found += sum(min(part.nbytes, pieces * PIECE) for part in tensor.remotes)
    return found * 3 // 2


class MappedFiles:
    """Files that are mapped into memory, for inputs that are read again and again; safe to use from many threads at once.

    A file that was changed is mapped again. If one is made shorter while it is read, the system ends the process.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int, int], Tensor]] = {}
        self._lock = threading.Lock()

    def open(self, path: Path) -> Tensor | None:
        """Return the bytes of a file, uint8; None if it cannot be mapped. Writing to them does not change the file."""
        import torch

        with self._lock, contextlib.suppress(OSError, RuntimeError):
            status = path.stat()
            about = (status.st_ino, status.st_size, status.st_mtime_ns)
            if path not in self._known or self._known[path][0] != about:
                mapped = torch.from_file(str(path), shared=False, size=status.st_size, dtype=torch.uint8)
                self._known[path] = about, mapped
            return self._known[path][1]
        return None


class Reader:
    """Reads tensors of any number of checkpoints; safe to use from many threads at once.

    Files stay open between reads; when there are too many, the least recently used is closed. Use it as a context
    manager, or call `close`.

    Args:
        max_open_files: The largest number of files that stay open between reads.
        fetched: Bytes of remote tensors that are kept in memory between reads, about; 0 if most is read once and whole.
        mapped: Maps the files into memory, for `view`; None if all is to be read.
    """

    def __init__(self, max_open_files: int = MAX_OPEN, *, fetched: int = 0, mapped: MappedFiles | None = None) -> None:
        self._files: Descriptors[Path] = Descriptors(max_open_files)
        self._pieces = Pieces(fetched)
        self._mapped = mapped
        self._views: dict[Path, Tensor | None] = {}

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

    def view(self, tensor: TensorInfo, start: int, nbytes: int) -> Tensor | None:
        """Return bytes of a tensor where they lie in its mapped file, uint8; None if they must be read.

        Args:
            tensor: What to return.
            start: The first byte wanted, counted from the beginning of the tensor.
            nbytes: How many.
        """
        if self._mapped is None or tensor.source is not None or tensor.remote is not None:
            return None
        if tensor.file not in self._views:
            self._views[tensor.file] = self._mapped.open(tensor.file)
        whole, offset = self._views[tensor.file], tensor.offset + start
        # where the file ends too early, reading says so
        if whole is None or offset % tensor.dtype.itemsize or offset + nbytes > whole.numel():
            return None
        return whole[offset : offset + nbytes]

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
