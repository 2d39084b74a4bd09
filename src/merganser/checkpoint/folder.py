"""Open a checkpoint from its headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, NotFoundError
from ..jsonfile import exists, os_reason, read_object
from ..wording import brief, some
from .files.index import check_index, check_shard_name, read_weight_map
from .files.links import inside
from .files.weights import (
    GGUF_SUFFIX,
    PICKLED_SUFFIXES,
    TRAINER_SUFFIX,
    Weights,
    choose_weights,
    may_be_weights,
    refuse_name,
)
from .formats.distributed import METADATA_NAME, read_distributed
from .formats.gguf.beside import folder_beside
from .formats.gguf.read import parts_of, read_gguf
from .formats.original import has_original_names, read_original
from .formats.pickled import PickledFile, read_pickled
from .formats.quantised.read import Quantisation, declared_dtype, dequantise
from .formats.safetensors import read_header, read_remote_header
from .hub import Partial, is_hub_id, partial_snapshot, snapshot
from .opened import Checkpoint
from .ranges.fetch import open_remote
from .ranges.file import RemoteFile
from .tensor import TensorInfo
from .wrappers import unwrap

__all__ = ["Checkpoint", "open_checkpoint", "open_tokenizer"]

WEIGHTS_KEY = "transformers_weights"
"""Key of config.json with the name of the weights file, or of its index, if it is not the usual name."""

PARAMS_NAME = "params.json"
"""The config of Meta's and Mistral's own programs."""

_MAX_NAME = 500
"""Largest number of characters in a tensor's name; published models have at most about 150."""


def open_checkpoint(
    reference: str, *, revision: str | None = None, cache_dir: Path | None = None, stream: bool = False
) -> Checkpoint:
    """Open a checkpoint: read its headers, index and config, but no weights.

    Args:
        reference: a folder, a weight file, or the id of a model on the Hugging Face Hub (`org/name`). A path that
            exists, or that cannot be a Hub id, is never looked up on the Hub.
        revision: the branch, tag or commit on the Hub.
        cache_dir: the folder for models from the Hub; by default the one that huggingface_hub uses.
        stream: read weight files of the Hub by ranges, whenever tensors are read, rather than fetch them; files that are in
            `cache_dir` are read from there.

    Raises:
        NotFoundError: there is no such model, or one of its files is missing.
        CheckpointError: a file is damaged, contradicts another, or is not a checkpoint.
        UnsupportedError: a LoRA adapter, or weights that cannot be read by ranges.
        UnreachableError: the Hub stopped answering while headers were read by ranges.
    """
    path = _existing(reference)
    partial: Partial | None = None
    if path is None and is_hub_id(reference) and stream:
        partial = partial_snapshot(reference, revision=revision, cache_dir=cache_dir)
        path = partial.folder
    elif path is None and is_hub_id(reference):
        path = snapshot(reference, revision=revision, cache_dir=cache_dir)
    elif path is None:
        raise NotFoundError(f"model {reference!r} not found: no such file or folder")
    elif revision is not None:
        raise CheckpointError(
            f"{reference}: revision {revision!r} is given, but the model is a folder on this machine; leave the revision out"
        )
    try:
        found = _open_folder(reference, path, partial) if path.is_dir() else _open_file(reference, path)
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


def open_tokenizer(
    reference: str, *, revision: str | None = None, cache_dir: Path | None = None, stream: bool = False
) -> Checkpoint:
    """Open a checkpoint, or a folder that holds a tokenizer but no weights; then the checkpoint has no tensors.

    Args:
        reference: As for `open_checkpoint`.
        revision: The branch, tag or commit on the Hub.
        cache_dir: The folder for models from the Hub.
        stream: As for `open_checkpoint`.

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
    return open_checkpoint(reference, revision=revision, cache_dir=cache_dir, stream=stream)


def _existing(reference: str) -> Path | None:
    if not reference.strip() or "\0" in reference:
        raise NotFoundError(
            f"model {reference!r} not found: the path is empty or holds a NUL character; write the path of a folder or a file"
        )
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


def _open_folder(reference: str, folder: Path, partial: Partial | None = None) -> Checkpoint:
    missing = () if partial is None else partial.missing
    names = [*(path.name for path in folder.iterdir()), *missing]
    if METADATA_NAME in names and not any(name.endswith((".safetensors", *PICKLED_SUFFIXES)) for name in names):
        tensors, files, left_out = read_distributed(folder)
        by_name = {tensor.name: tensor for tensor in tensors}
        return Checkpoint(reference, folder, _read_config(folder), by_name, files, {}, left_out=left_out)
    weights = _named_weights(folder, missing) or choose_weights(str(folder), names)
    if weights.rival is not None:
        _check_rival(folder, weights.files[0], weights.rival)
    if weights.files and weights.files[0].endswith(GGUF_SUFFIX):
        return _open_gguf(reference, folder, *weights.files)
    if weights.index is not None:
        opened = _open_index(reference, folder, folder / weights.index, partial)
    elif weights.cut:
        return _open_cut(reference, folder, [folder / name for name in weights.files])
    else:
        opened = _assemble(reference, folder, [folder / name for name in weights.files], partial)
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
        raise CheckpointError(f"{files[0]}: holds no tensors; fetch it again, or give the file that has the weights")
    types = f"{', '.join(found.schemes)} ({files[0].name})" if found.schemes else None
    quantisation = None if types is None else Quantisation(types, found.schemes)
    return Checkpoint(reference, folder, config, tensors, files, {}, quantisation=quantisation, left_out=found.left_out)


def _named_weights(folder: Path, missing: Sequence[str]) -> Weights | None:
    """Return the weights that config.json names; transformers loads these, whatever other files exist."""
    name = _read_config(folder).get(WEIGHTS_KEY)
    if name is None:
        return None
    config = folder / "config.json"
    if not isinstance(name, str):
        raise CheckpointError(f"{config}: {WEIGHTS_KEY} must be the name of a file, found {brief(name)}")
    check_shard_name(config, name.removesuffix(".index.json"))
    if not (folder / name).exists() and name not in missing:
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


def _open_index(reference: str, folder: Path, index: Path, partial: Partial | None = None) -> Checkpoint:
    weight_map = read_weight_map(index)
    files = []
    for name in sorted(set(weight_map.values())):
        file = inside(folder, name, str(index))
        if not file.exists() and (partial is None or name not in partial.missing):
            count = sum(target == name for target in weight_map.values())
            raise NotFoundError(f"{file}: no such file, but {index} says that it holds {count} tensors")
        files.append(file)
    checkpoint = _assemble(reference, folder, files, partial)
    check_index(index, weight_map, checkpoint.tensors)
    return checkpoint


def _assemble(reference: str, folder: Path, files: list[Path], partial: Partial | None = None) -> Checkpoint:
    remote = {} if partial is None else _remote(reference, folder, files, partial)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        for tensor in _read(file, metadata, remote.get(file)):
            _check_name(tensor)
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{file}: tensor {tensor.name!r} is in {tensors[tensor.name].file.name} too; it can be in one only"
                )
            tensors[tensor.name] = tensor
    if not tensors:
        raise CheckpointError(f"{files[0]}: holds no tensors; fetch it again, or give the file that has the weights")
    return Checkpoint(reference, folder, _read_config(folder), tensors, files, metadata, remote=remote)


def _remote(reference: str, folder: Path, files: Sequence[Path], partial: Partial) -> dict[Path, RemoteFile]:
    """Return those of the files that are on the Hub only."""
    names = {file: file.relative_to(folder).as_posix() for file in files}
    return {file: open_remote(reference, partial.commit, n) for file, n in names.items() if n in partial.missing}


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
        raise CheckpointError(
            f"{tensor.file}: tensor {name!r}: the name is not valid Unicode; rename the tensor"
        ) from None


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


def _read(file: Path, metadata: dict[str, str], remote: RemoteFile | None = None) -> Iterable[TensorInfo]:
    if remote is not None:
        tensors, found = read_remote_header(file, remote)
        metadata.update(found)
        return tensors
    _require_file(file)
    if not file.name.endswith(".safetensors"):
        return read_pickled(file)
    tensors, found = read_header(file)
    metadata.update(found)
    return tensors


def open_reference(text: str, *, cache_dir: Path | None = None, stream: bool = False) -> Checkpoint:
    """Open a checkpoint by what a user writes: a path, or a Hub id that may end in `@revision`.

    Raises:
        NotFoundError: There is no such model.
        CheckpointError: It is damaged.
    """
    path, at, revision = text.rpartition("@")
    if at and revision and is_hub_id(path) and not exists(text):
        return open_checkpoint(path, revision=revision, cache_dir=cache_dir, stream=stream)
    return open_checkpoint(text, cache_dir=cache_dir, stream=stream)
