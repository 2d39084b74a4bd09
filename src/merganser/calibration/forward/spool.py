"""The outputs of blocks on disk: the hidden states of all tokens, without padding."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ...errors import OutputError
from ...jsonfile import os_reason
from ...system import open_binary, read_at, write_at

__all__ = ["Spool"]


class Spool:
    """A file of hidden states, one row per token.

    Use it as a context manager. It is read and written at offsets, not memory-mapped, since mapped pages count as
    memory of this process.

    Args:
        path: The file; an existing one is opened.

    Raises:
        OutputError: The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = open_binary(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise self._failed(error) from None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def write(self, first: int, rows: Tensor) -> None:
        """Write the rows of some tokens.

        Args:
            first: Index of the first token.
            rows: Shape [tokens, width], the same width and dtype in every call.

        Raises:
            OutputError: The disk is full or failed.
        """
        data = _bytes(rows)
        offset = first * rows.shape[1] * rows.element_size()
        try:
            write_at(self._descriptor, data, offset)
        except OSError as error:
            raise self._failed(error) from None

    def read(self, first: int, count: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return the rows of some tokens, shape [count, width].

        Raises:
            OutputError: The file is too short, or the disk failed.
        """
        rows = torch.empty(count, width, dtype=dtype)
        data = _bytes(rows)
        offset = first * width * rows.element_size()
        try:
            if read_at(self._descriptor, data, offset) < len(data):
                raise OutputError(f"{self.path}: became shorter while it was used; start again")
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise self._failed(error) from None
        return rows

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path}: cannot be written: {os_reason(error)}; make room, or choose another disk")


def _bytes(rows: Tensor) -> memoryview:
    return rows.view(torch.uint8).numpy().data.cast("B")
