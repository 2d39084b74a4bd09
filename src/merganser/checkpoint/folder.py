"""A checkpoint on disk, opened from its headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, NotFoundError
from ..jsonfile import exists, os_reason, read_object
from ..wording import brief, some
from .formats.distributed import METADATA_NAME, read_distributed
from .formats.gguf.beside import folder_beside
from .formats.gguf.read import parts_of, read_gguf
from .formats.original import has_original_names, read_original
from .formats.pickled import PickledFile, read_pickled
from .formats.quantised.read import Quantisation, declared_dtype, dequantise
from .formats.safetensors import read_header
from .hub import is_hub_id, snapshot
from .index import check_index, check_shard_name, read_weight_map
from .links import inside
from .reader import Reader
from .sidefiles import list_side_files
from .tensor import TensorInfo
from .weights import (
    GGUF_SUFFIX,
    PICKLED_SUFFIXES,
    TRAINER_SUFFIX,
    Weights,
    choose_weights,
    may_be_weights,
    refuse_name,
)
from .wrappers import unwrap

__all__ = ["Checkpoint", "open_checkpoint", "open_tokenizer"]

WEIGHTS_KEY = "transformers_weights"
"""Key of config.json with the name of the weights file, or of its index, if it is not the usual name."""

PARAMS_NAME = "params.json"
"""The config of Meta's and Mistral's own programs."""

_MAX_NAME = 500
"""Largest number of characters in a tensor's name; published models have at most about 150."""


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


def open_checkpoint(reference: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Checkpoint:
    """Open a checkpoint: read its headers, index and config, but no weights.

    Args:
        reference: a folder, a weight file, or the id of a model on the Hugging Face Hub (`org/name`). A path that
            exists, or that cannot be a Hub id, is never looked up on the Hub.
        revision: the branch, tag or commit on the Hub.
        cache_dir: the folder for models from the Hub; by default the one that huggingface_hub uses.

    Raises:
        NotFoundError: there is no such model, or one of its files is missing.
        CheckpointError: a file is damaged, contradicts another, or is not a checkpoint.
        UnsupportedError: a GGUF file or a LoRA adapter.
    """
    path = _existing(reference)
    if path is None and is_hub_id(reference):
        path = snapshot(reference, revision=revision, cache_dir=cache_dir)
    elif path is None:
        raise NotFoundError(f"model {reference!r} not found: no such file or folder")
    elif revision is not None:
        raise CheckpointError(f"{reference}: revision {revision!r} is given, but the model is a folder on this machine")
    try:
        found = _open_folder(reference, path) if path.is_dir() else _open_file(reference, path)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{error.filename or path}: cannot be read: {os_reason(error)}") from None
    tensors, wrappers = unwrap(reference, found.tensors, trained=_trained(found))
    quantisation = found.quantisation
    if quantisation is None:
        tensors, quantisation = dequantise(reference, found.config, tensors, found.metadata)
    left_out = {**found.left_out, **(quantisation.left_out if quantisation is not None else {})}
    return replace(found, tensors=tensors, wrappers=tuple(wrappers), quantisation=quantisation, left_out=left_out)


def open_tokenizer(reference: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Checkpoint:
    """Open a checkpoint, or a folder that holds a tokenizer but no weights; then the checkpoint has no tensors.

    Args:
        reference: As for `open_checkpoint`.
        revision: The branch, tag or commit on the Hub.
        cache_dir: The folder for models from the Hub.

    Raises:
        NotFoundError: There is no such model or folder.
        CheckpointError: A file is damaged.
    """
    path = _existing(reference)
    if path is not None and path.is_dir() and revision is None:
        names = [each.name for each in path.iterdir()]
        endings = (".safetensors", *PICKLED_SUFFIXES, TRAINER_SUFFIX, ".index.json", ".gguf")
        if not any(name.endswith(endings) for name in names):
            return Checkpoint(reference, path, _read_config(path), {}, [], {})
    return open_checkpoint(reference, revision=revision, cache_dir=cache_dir)


def _existing(reference: str) -> Path | None:
    if not reference.strip() or "\0" in reference:
        raise NotFoundError(f"model {reference!r} not found: the path is empty or holds a NUL character")
    try:
        path = Path(reference).expanduser()
        path.stat()
        return path
    except PermissionError:
        raise CheckpointError(f"{reference}: cannot be read: permission denied") from None
    except (OSError, RuntimeError, UnicodeError):  # too long, unknown home folder, circular links, lone surrogate
        return None


def _open_file(reference: str, file: Path) -> Checkpoint:
    if file.name.endswith(".index.json"):
        return _open_index(reference, file.parent, file)
    refuse_name(str(file), file.name)
    if file.name.endswith(GGUF_SUFFIX):
        return _open_gguf(reference, file.parent, file.name)
    opened = _assemble(reference, file.parent, [file])
    if file.name.startswith("consolidated"):
        opened = _renamed(opened)
    return replace(opened, loose=not (file.parent / "config.json").exists())


def _open_folder(reference: str, folder: Path) -> Checkpoint:
    names = [path.name for path in folder.iterdir()]
    if METADATA_NAME in names and not any(name.endswith((".safetensors", *PICKLED_SUFFIXES)) for name in names):
        tensors, files, left_out = read_distributed(folder)
        by_name = {tensor.name: tensor for tensor in tensors}
        return Checkpoint(reference, folder, _read_config(folder), by_name, files, {}, left_out=left_out)
    weights = _named_weights(folder) or choose_weights(str(folder), names)
    if weights.rival is not None:
        _check_rival(folder, weights.files[0], weights.rival)
    if weights.files and weights.files[0].endswith(GGUF_SUFFIX):
        return _open_gguf(reference, folder, *weights.files)
    if weights.index is not None:
        opened = _open_index(reference, folder, folder / weights.index)
    elif weights.cut:
        return _open_cut(reference, folder, [folder / name for name in weights.files])
    else:
        opened = _assemble(reference, folder, [folder / name for name in weights.files])
    return replace(_renamed(opened), unread=_unread(names, opened.weight_files))


def _open_cut(reference: str, folder: Path, files: list[Path]) -> Checkpoint:
    """Open an original checkpoint of Llama that was cut up for several GPUs."""
    if not exists(folder / PARAMS_NAME):
        raise CheckpointError(
            f"{folder}: {some([file.name for file in files], 4)}: the parts of an original PyTorch checkpoint of Llama, in which "
            f"every matrix is cut into as many pieces as there are files; put its {PARAMS_NAME} beside them, which says how"
        )
    parts = [{tensor.name: tensor for tensor in _read(file, {})} for file in files]
    return _as_original(Checkpoint(reference, folder, _read_config(folder), {}, files, {}), parts)


def _renamed(opened: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the names of transformers, if it has those of Meta's and Mistral's own programs."""
    if not has_original_names(opened.tensors) or not exists(opened.path / PARAMS_NAME):
        return opened
    return _as_original(opened, [opened.tensors])


def _as_original(opened: Checkpoint, parts: Sequence[Mapping[str, TensorInfo]]) -> Checkpoint:
    file = inside(opened.path, PARAMS_NAME, str(opened.path))
    found = read_original(file, read_object(file), parts)
    config = opened.config or found.config
    notes = list(found.notes) if not opened.config else []
    if not exists(opened.path / "tokenizer.json"):
        notes.append(
            f"{opened.reference}: has no tokenizer.json, only what Meta's and Mistral's own programs read, so the output may need "
            "the tokenizer files of the Hugging Face model"
        )
    return replace(opened, tensors=found.tensors, config=config, left_out=found.left_out, notes=tuple(notes))


def _open_gguf(reference: str, folder: Path, *names: str) -> Checkpoint:
    """Open GGUF files; where no config.json lies beside them, it and the tokenizer are made from the first."""
    files = parts_of(folder / names[0]) if len(names) == 1 else [folder / name for name in names]
    for file in files:
        _require_file(file)
    config = _read_config(folder)
    found = read_gguf(files, declared_dtype(config))
    if not config:
        folder = folder_beside(files[0])
        config = _read_config(folder)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    if not tensors:
        raise CheckpointError(f"{files[0]}: holds no tensors")
    types = f"{', '.join(found.schemes)} ({files[0].name})" if found.schemes else None
    quantisation = None if types is None else Quantisation(types, found.schemes)
    return Checkpoint(reference, folder, config, tensors, files, {}, quantisation=quantisation, left_out=found.left_out)


def _named_weights(folder: Path) -> Weights | None:
    """Return the weights that config.json names; transformers loads these, whatever other files exist."""
    name = _read_config(folder).get(WEIGHTS_KEY)
    if name is None:
        return None
    config = folder / "config.json"
    if not isinstance(name, str):
        raise CheckpointError(f"{config}: {WEIGHTS_KEY} must be the name of a file, found {brief(name)}")
    check_shard_name(config, name.removesuffix(".index.json"))
    if not (folder / name).exists():
        raise NotFoundError(f"{folder / name}: no such file, but {config} names it in {WEIGHTS_KEY}")
    return Weights(name, ()) if name.endswith(".index.json") else Weights(None, (name,))


def _check_rival(folder: Path, file: str, index: str) -> None:
    """Refuse a weights file with an index of other files: transformers loads the file, other programs the index."""
    others = sorted(set(read_weight_map(folder / index).values()) - {file})
    if others:
        raise CheckpointError(
            f"{folder}: both {file} and {index} (for {some(others, 2)}) are there, and it is not clear which are the model's; "
            f"remove the others, or give the path of the one that is meant, such as {folder / index}"
        )


def _trained(opened: Checkpoint) -> bool:
    """Return whether a trainer wrote the weights, beside the state of the training."""
    return any(isinstance(each.source, PickledFile) and each.source.wrapped for each in opened.tensors.values())


def _unread(names: Iterable[str], files: Sequence[Path]) -> tuple[str, ...]:
    """Return the folder's other weight files of the same format, which are not part of the checkpoint."""
    chosen = {file.name for file in files}
    suffix = files[0].suffix
    return tuple(
        sorted(name for name in names if name.endswith(suffix) and may_be_weights(name) and name not in chosen)
    )


def _open_index(reference: str, folder: Path, index: Path) -> Checkpoint:
    weight_map = read_weight_map(index)
    files = []
    for name in sorted(set(weight_map.values())):
        file = inside(folder, name, str(index))
        if not file.exists():
            count = sum(target == name for target in weight_map.values())
            raise NotFoundError(f"{file}: no such file, but {index} says that it holds {count} tensors")
        files.append(file)
    checkpoint = _assemble(reference, folder, files)
    check_index(index, weight_map, checkpoint.tensors)
    return checkpoint


def _assemble(reference: str, folder: Path, files: list[Path]) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        for tensor in _read(file, metadata):
            _check_name(tensor)
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{file}: tensor {tensor.name!r} is in {tensors[tensor.name].file.name} too; it can be in one only"
                )
            tensors[tensor.name] = tensor
    if not tensors:
        raise CheckpointError(f"{files[0]}: holds no tensors")
    return Checkpoint(reference, folder, _read_config(folder), tensors, files, metadata)


def _check_name(tensor: TensorInfo) -> None:
    """Refuse a name that a safetensors file cannot hold, or that is too long.

    Finding layers splits names at every dot, which would take minutes for a name of tens of thousands of parts.
    """
    name = tensor.name
    if len(name) > _MAX_NAME:
        raise CheckpointError(
            f"{tensor.file}: tensor {name[:40] + '...'!r}: the name has {len(name):,} characters; at most {_MAX_NAME} are "
            "accepted"
        )
    if name == "__metadata__":
        raise CheckpointError(
            f"{tensor.file}: tensor {name!r}: safetensors keeps this name for itself; rename the tensor"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{tensor.file}: tensor {name!r}: the name is not valid Unicode") from None


def _read_config(folder: Path) -> dict[str, Any]:
    config = folder / "config.json"
    if not config.is_symlink() and not config.exists():
        return {}
    return read_object(inside(folder, config.name, str(folder)))


def _require_file(file: Path) -> None:
    if not file.exists():
        raise NotFoundError(f"{file}: is a link to a file that is not there; fetch the checkpoint again")
    if not file.is_file():
        # Reading a pipe or a device might wait forever or never end.
        kind = "a directory" if file.is_dir() else "not a regular file"
        raise CheckpointError(f"{file}: is {kind}, a file with weights is needed")


def _read(file: Path, metadata: dict[str, str]) -> Iterable[TensorInfo]:
    _require_file(file)
    if not file.name.endswith(".safetensors"):
        return read_pickled(file)
    tensors, found = read_header(file)
    metadata.update(found)
    return tensors


def open_reference(text: str, *, cache_dir: Path | None = None) -> Checkpoint:
    """Open a checkpoint by what a user writes: a path, or a Hub id that may end in `@revision`.

    Raises:
        NotFoundError: There is no such model.
        CheckpointError: It is damaged.
    """
    path, at, revision = text.rpartition("@")
    if at and revision and is_hub_id(path) and not exists(text):
        return open_checkpoint(path, revision=revision, cache_dir=cache_dir)
    return open_checkpoint(text, cache_dir=cache_dir)
