"""A checkpoint that was opened: what its headers and its config say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .files.links import inside
from .files.sidefiles import list_side_files
from .formats.quantised.read import Quantisation
from .ranges.file import RemoteFile
from .reader import Reader
from .tensor import TensorInfo

__all__ = ["Checkpoint"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model on disk: its config, and the names, shapes, dtypes and places of its tensors, but not their values.

    Attributes:
        reference: the path or Hub id as the user wrote it.
        path: the local folder.
        config: the contents of `config.json`; empty if there is none.
        tensors: by name, in the order of the files and of the bytes within each; quantised weights by the names of the
            unquantised model, and dequantised when they are read.
        weight_files: the files that hold the tensors.
        metadata: the `__metadata__` of the safetensors headers.
        wrappers: prefixes of training frameworks, such as `_orig_mod.`, that were stripped from the names of tensors.
        unread: names of files in the folder that may also hold weights and are not read.
        quantisation: how the weights are quantised; None if they are not.
        left_out: tensors of the files that are not among `tensors`, and why, by name.
        remote: those of `weight_files` that are read from the Hub by ranges and are not on this machine.
        loose: whether it is a single file in a folder without config.json; other files there are not the model's.
        adapter: the files of an adapter that its tensors are read with: config and weights; empty without one.
        notes: what a user should know of an adapter and this model, or of how its config was made.
    """

    reference: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    weight_files: list[Path]
    metadata: dict[str, str]
    wrappers: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    loose: bool = False
    quantisation: Quantisation | None = None
    adapter: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    remote: Mapping[Path, RemoteFile] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @cached_property
    def side_files(self) -> list[Path]:
        """The files to copy to an output in addition to weights and config: tokenizer, templates, code, licence.

        A copy keeps its path relative to `path`.

        Raises:
            CheckpointError: one is a pipe, a device, or a link that is broken or leaves the folder.
        """
        return [] if self.loose else list_side_files(self.path)

    def side_file(self, name: str) -> Path | None:
        """Return the side file of this name, or None if there is none.

        Raises:
            CheckpointError: the file is a link that is broken or leaves the folder.
        """
        file = self.path / name
        there = not self.loose and (file.is_symlink() or file.exists())
        return inside(self.path, name, str(self.path)) if there else None

    @property
    def quantised(self) -> str | None:
        """Why the weights count as quantised, as in `fp8 (config.json quantization_config.quant_method)`, or None."""
        return None if self.quantisation is None else self.quantisation.evidence

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors in their files."""
        return sum(tensor.nbytes_stored for tensor in self.tensors.values())

    def reader(self) -> Reader:
        """Return a new reader, which can read the tensors of any checkpoint."""
        return Reader()
