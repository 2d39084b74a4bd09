"""Tensors that take the place of others: on disk until the output is written, and as tensors that a plan copies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import DTYPE_BY_NAME, DType, TensorInfo, derive, open_checkpoint
from ..checkpoint.derived.derived import read_rows
from ..checkpoint.tensor import ByteReader
from ..errors import OutputError
from ..jsonfile import os_reason
from .kernels.assignment import untouched
from .kernels.blocks import BLOCK
from .plan.tensor import PlannedTensor

__all__ = ["TensorSpool", "copied_from"]


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

    def planned(self, name: str, beside: TensorInfo, dtype: DType, what: str) -> TensorInfo:
        """Return a stored tensor for a plan.

        Args:
            name: Its name.
            beside: A tensor of the model that it is made of.
            dtype: Its dtype.
            what: What it is, such as "of fewer experts"; it is named so in the record.
        """
        stored = self._tensors[name]
        # its own name distinguishes it from the tensors of the file that it is recorded under
        own = f"{name} {what}"
        return derive(own, stored.shape, [beside], _Stored(stored), natural=dtype, dtype=stored.dtype)


def copied_from(
    like: PlannedTensor,
    info: TensorInfo,
    *,
    name: str | None = None,
    dtype: DType | None = None,
    role: str | None = None,
    scale: float = 1.0,
) -> PlannedTensor:
    """Return a planned tensor like another one that takes the values of a tensor as they are.

    Args:
        like: Gives name, dtype, role and place in the model.
        info: Gives shape and values.
        name: Another name. What `like` says of how its own bytes are stored does not hold for it.
        dtype: Another dtype.
        role: Another role.
        scale: A factor of the values.
    """
    same = untouched()
    out = dtype or like.dtype
    wide = "float64" in (out.name, info.dtype.name)
    found = replace(
        like,
        dtype=out,
        compute_dtype=DTYPE_BY_NAME["float64" if wide else "float32"],
        shape=info.shape,
        copy=False,
        method=same.method,
        base=None,
        models=(info,),
        parameters=same.parameters if scale == 1.0 else {**same.parameters, "scale": (scale,)},
        located={},
        role=role or like.role,
        nbytes=out.nbytes(info.numel),
    )
    if name is None:
        return found
    return replace(found, name=name, data={}, turned=False, block_limit=BLOCK, quantised=None, gguf=None)
