"""Bytes of tensors, from many files and many threads."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import CheckpointError, NotFoundError
from ..jsonfile import os_reason
from .tensor import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reader"]

_MAX_OPEN_FILES = 64


class _OpenFile:
    """A file descriptor and the number of threads that use it right now."""

    __slots__ = ("descriptor", "lock", "users")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.users = 0
        self.lock = threading.Lock()  # only for systems that cannot read at an offset

    def read(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [buffer], offset)
        with self.lock:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            data = os.read(self.descriptor, len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Reader:
    """Reads tensors of any number of checkpoints; safe to use from many threads at once.

    Files stay open between reads, the least recently used is closed when there are too many. Use it as a context
    manager, or call `close`.
    """

    def __init__(self, max_open_files: int = _MAX_OPEN_FILES) -> None:
        self._max_open_files = max_open_files
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

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
            buffer: writable and contiguous; its length says how much is read.

        Raises:
            CheckpointError: the file is shorter than its header promised, or cannot be read.
            ValueError: the range does not lie inside the tensor.
        """
        if not buffer.nbytes:
            return
        target = buffer.cast("B")
        if start < 0 or start + len(target) > tensor.nbytes:
            raise ValueError(f"{tensor.name!r}: bytes {start}..{start + len(target)} of a tensor of {tensor.nbytes}")
        if tensor.source is not None:
            tensor.source.read_into(tensor.name, start, target)
            return
        offset = tensor.offset + start
        with self._open(tensor) as file:
            while target:
                try:
                    count = file.read(offset, target)
                except OSError as error:
                    raise CheckpointError(
                        f"{tensor.file}: tensor {tensor.name!r}: cannot be read: {os_reason(error)}"
                    ) from None
                if count == 0:
                    raise CheckpointError(
                        f"{tensor.file}: tensor {tensor.name!r}: truncated: the file ends at byte {offset}, "
                        f"the tensor at byte {tensor.offset + tensor.nbytes}; was the file changed meanwhile?"
                    )
                offset += count
                target = target[count:]

    def tensor(self, tensor: TensorInfo) -> Tensor:
        """Read a tensor whole, in its own dtype and shape.

        Raises:
            CheckpointError: the file is shorter than its header promised, or cannot be read.
        """
        import torch

        memory = torch.empty(tensor.nbytes, dtype=torch.uint8)
        self.read_into(tensor, 0, memory.numpy().data)
        return memory.view(getattr(torch, tensor.dtype.name)).view(tensor.shape)

    def will_need(self, tensor: TensorInfo, start: int, nbytes: int) -> None:
        """Tell the system that these bytes of the tensor will be read soon; does nothing where it cannot be told."""
        if tensor.source is not None or nbytes <= 0 or not hasattr(os, "posix_fadvise"):
            return
        # Only advice: a file that cannot be read says so at the read itself.
        with contextlib.suppress(OSError, CheckpointError), self._open(tensor) as file:
            os.posix_fadvise(file.descriptor, tensor.offset + start, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close all files. No other thread may be reading."""
        with self._lock:
            self._closed = True
            for file in self._files.values():
                os.close(file.descriptor)
            self._files.clear()

    @contextlib.contextmanager
    def _open(self, tensor: TensorInfo) -> Iterator[_OpenFile]:
        path = tensor.file
        with self._lock:
            if self._closed:
                raise ValueError("the reader is closed")
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _OpenFile(_descriptor(tensor))
            self._files.move_to_end(path)
            file.users += 1
        try:
            yield file
        finally:
            with self._lock:
                file.users -= 1
                self._close_surplus()

    def _close_surplus(self) -> None:
        """Close the least recently used files beyond the limit, but none that a thread reads: its number may be reused."""
        surplus = len(self._files) - self._max_open_files
        if surplus <= 0:
            return
        idle = [path for path, file in self._files.items() if file.users == 0]
        for path in idle[:surplus]:
            os.close(self._files.pop(path).descriptor)


def _descriptor(tensor: TensorInfo) -> int:
    try:
        return os.open(tensor.file, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise NotFoundError(f"{tensor.file}: tensor {tensor.name!r}: the file is no longer there") from None
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r}: cannot be read: {os_reason(error)}") from None
