"""New tensors on disk until the output is written, and as tensors that a plan copies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ...checkpoint import DType, TensorInfo, derive, open_checkpoint
from ...checkpoint.derived import read_rows
from ...checkpoint.tensor import ByteReader
from ...errors import OutputError
from ...jsonfile import os_reason

__all__ = ["TensorSpool"]


@dataclass(frozen=True, slots=True)
class _Stored:
    """Rows of a tensor of the spool."""

    tensor: TensorInfo

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        return read_rows(reader, self.tensor, first, end)


class TensorSpool:
    """Tensors in a folder, a file per layer.

    Args:
        folder: The folder; it must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digest = hashlib.sha256()
        self._files = 0
        self._tensors: dict[str, TensorInfo] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors.

        Raises:
            OutputError: The disk is full or failed.
        """
        file = self._folder / f"{self._files}.safetensors"
        self._files += 1
        try:
            save_file(dict(tensors), file)
            with file.open("rb") as stored:
                while piece := stored.read(1 << 20):
                    self._digest.update(piece)
        except OSError as error:
            raise OutputError(
                f"{file}: cannot be written: {os_reason(error)}; make room, or choose another disk"
            ) from None
        self._tensors |= open_checkpoint(str(file)).tensors

    @property
    def digest(self) -> str:
        """Hash of everything that was stored."""
        return self._digest.hexdigest()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The stored tensors by name."""
        return self._tensors

    def planned(self, name: str, beside: TensorInfo, dtype: DType) -> TensorInfo:
        """Return a stored tensor for a plan.

        Args:
            name: Its name.
            beside: A tensor of the model that it is made of.
            dtype: Its dtype.
        """
        stored = self._tensors[name]
        # a name of its own tells it apart from the tensors of the file that it counts to
        own = f"{name} of fewer experts"
        return derive(own, stored.shape, [beside], _Stored(stored), natural=dtype, dtype=stored.dtype)
