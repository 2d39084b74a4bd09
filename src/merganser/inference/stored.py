"""Models as they are stored, opened but not yet read: checkpoints, checkpoints with LoRA adapters, tasks of sidecars.

A source of any kind gives the model's config, the files of its tokenizer, and its state dict on demand. `sources` opens
recipes, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from ..adapters import open_reference
from ..anatomy.settings.config import unquantised
from ..checkpoint import Checkpoint, Reader, open_checkpoint
from ..checkpoint.files.links import inside
from ..errors import CheckpointError, NotFoundError
from ..jsonfile import exists, open_regular, os_reason, read_object

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["checkpoint", "adapter", "recipe", "sidecar", "routed"]

_HASH_BLOCK = 1 << 24


@dataclass(frozen=True)
class Source:
    """A model that can be read.

    Args:
        reference: The reference as the user wrote it.
        kind: Kind of the model.
        config: Contents of config.json.
        files: Paths of tokenizer and other side files, by name.
        texts: Contents of side files that do not exist on disk, by name.
        make_hash: Returns `hash`; that of a checkpoint reads all its files.
        read: Reads or merges the weights; returns the state dict, on the CPU.
        notes: What a user should know of the model.
    """

    reference: str
    kind: Kind
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    texts: Mapping[str, str]
    make_hash: Callable[[], str]
    read: Callable[[], dict[str, Tensor]]
    notes: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        """Hash of the contents of weights, config and tokenizer; it does not depend on the path."""
        return self.make_hash()


def open_stored(reference: str | Path, *, cache_dir: Path | None = None) -> Source:
    """Open a model of any kind but a recipe.

    Args:
        reference: A folder, a weight file, a Hub id (`org/name@revision`), `MODEL+ADAPTER`, or `OUT#TASK` (a task of a
            merge with sidecars).
        cache_dir: Folder for models from the Hub.

    Raises:
        MergeError: It does not exist, or is damaged.
    """
    text = str(reference)
    if not exists(text):
        out, sign, task = text.rpartition("#")
        if sign and out and task:
            return _open_sidecar(Path(out).expanduser(), task, text, cache_dir)
    checkpoint = _open_checkpoint(text, cache_dir)
    kind: Kind = "adapter" if checkpoint.adapter else "checkpoint"
    return _source(text, kind, checkpoint, lambda: hash_checkpoint(checkpoint), lambda: _read(checkpoint))


def _open_checkpoint(text: str, cache_dir: Path | None) -> Checkpoint:
    checkpoint = open_reference(text, cache_dir=cache_dir)
    found = checkpoint.quantisation
    if found is None:
        return checkpoint
    if found.unreadable is not None:
        raise CheckpointError(
            f"{text}: its weights are quantised ({found.evidence}); {found.unreadable}; give the unquantised model"
        )
    return replace(checkpoint, config=unquantised(checkpoint.config))


def _source(
    text: str, kind: Kind, checkpoint: Checkpoint, make_hash: Callable[[], str], read: Callable[[], dict[str, Tensor]]
) -> Source:
    return Source(
        reference=text,
        kind=kind,
        config=checkpoint.config,
        files=_files(checkpoint),
        texts={},
        make_hash=make_hash,
        read=read,
        notes=checkpoint.notes,
    )


def _open_sidecar(out: Path, task: str, text: str, cache_dir: Path | None) -> Source:
    """Open a task of a merge with sidecars; reading it restores it in a temporary folder."""
    from ..engine.plan.sections.sidecars import INDEX_FILE
    from ..engine.sidecars.read import read_task
    from ..engine.sidecars.restoration import restore

    merged = _open_checkpoint(str(out), cache_dir)
    index = out / INDEX_FILE
    if not index.exists():
        raise NotFoundError(f"{text}: {out} has no sidecars, so no task {task!r} can be restored from it")
    stored = read_task(out, read_object(index), task)
    files = {name: inside(out, path, str(index)) for name, path in stored.files.items()}
    config = read_object(files.pop("config.json")) if "config.json" in files else dict(merged.config)

    def read() -> dict[str, Tensor]:
        with TemporaryDirectory(prefix="merganser-") as folder:
            found = restore(out, task, Path(folder, "restored"), cache_dir=cache_dir).out
            return _read(open_checkpoint(str(found)))

    parts = [xxh3_of_file(path) for path in (index, *(out / name for name in stored.parts), *files.values())]
    digest = hash_of(hash_checkpoint(merged), task, *parts)
    return Source(
        reference=text, kind="sidecar", config=config, files=files, texts={}, make_hash=lambda: digest, read=read
    )


def _read(checkpoint: Checkpoint) -> dict[str, Tensor]:
    with Reader() as reader:
        return {name: reader.tensor(tensor) for name, tensor in checkpoint.tensors.items()}


def _files(checkpoint: Checkpoint) -> dict[str, Path]:
    return {path.relative_to(checkpoint.path).as_posix(): path for path in checkpoint.side_files}


def hash_checkpoint(checkpoint: Checkpoint) -> str:
    """Return a hash of the contents of weights, config and side files; it does not depend on the path."""
    config = json.dumps(checkpoint.config, sort_keys=True)
    files = sorted(_files(checkpoint).items())
    beside = [part for name, path in files for part in (name, xxh3_of_file(path))]
    weights = dict.fromkeys([*checkpoint.weight_files, *checkpoint.adapter])
    return hash_of(config, *(xxh3_of_file(path) for path in weights), *beside)


def hash_of(*parts: str) -> str:
    """Return the xxh3-128 digest of several texts."""
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


def xxh3_of_file(path: Path) -> str:
    """Return the xxh3-128 digest of a file's contents; an unchanged file (size and time) is read only once.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        status = path.stat()
        return _hash_contents(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {os_reason(error)}") from None


@lru_cache(maxsize=4096)
def _hash_contents(path: Path, size: int, mtime_ns: int) -> str:
    digest = xxhash.xxh3_128()
    with open_regular(path) as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
