"""Restore a task's checkpoint from an output with sidecars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint import Checkpoint, open_checkpoint
from ...checkpoint.files.sidefiles import copy_file
from ...errors import CheckpointError, NotFoundError, OutputError, suggest_keywords
from ...files import sha256_of_file
from ...jsonfile import Entry, read_object
from ...process import one_thread
from ...record.format import RECORD_FORMAT, RECORD_NAME, record_text
from ...record.verification import verify

if TYPE_CHECKING:
    from ..output.staging import Staging
    from .read import Restorer, StoredTask

__all__ = ["Restored", "intact", "open_base", "read_sidecar_record", "refuse_source", "restore"]

_SHARD_BYTES = 5_000_000_000

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Restored:
    """The result of `restore`.

    Args:
        out: The folder that was written.
        record: Its record, as in its `merge.json`.
        warnings: What could not be removed.
    """

    out: Path
    record: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


@suggest_keywords
def restore(
    out: str | Path,
    task: str,
    target: str | Path | None = None,
    *,
    base: str | None = None,
    overwrite: bool = False,
    out_shard_size: int = _SHARD_BYTES,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Restored:
    """Write a task's checkpoint, restored from the merged model and the task's sidecar.

    Files of the output and tensors of the base are checked against the hashes of the merge.

    Args:
        out: Folder that a merge with sidecars wrote.
        task: Name of the task.
        target: Folder to write; by default next to `out`, named after it and the task. It appears when it is complete.
        base: The base of the merge, if it has moved; not every method needs it.
        overwrite: Replace a target that merganser wrote before, unless something in it was added or changed.
        out_shard_size: Largest size of a file, bytes.
        cache_dir: Folder for models from the Hub.
        progress: Called with the bytes checked and restored so far, and the total.

    Returns:
        The folder, and its record.

    Raises:
        NotFoundError: The output, its sidecars, the task or the base is missing.
        CheckpointError: A file of the output is damaged, or the base is not that of the merge.
        OutputError: The target exists, or cannot be written.
    """
    from ..output.staging import check_target
    from ..plan.sections.sidecars import INDEX_FILE
    from .read import read_task

    out = Path(out)
    record = read_sidecar_record(out)
    intact(out, [INDEX_FILE])
    stored = read_task(out, read_object(out / INDEX_FILE), task)
    # Only now is the task known to be in the index, and its name to be a valid folder name.
    target = Path(target) if target is not None else _beside(out, task)
    check_target(target, overwrite=overwrite)
    refuse_source(target, out)
    opened = None
    if any(tensor.base is not None for tensor in stored.tensors):
        opened = open_base(out, task, stored, base, cache_dir)
        refuse_source(target, opened.path)
    weights = [entry["file"] for entry in record["outputs"] if "/" not in entry["file"] and _is_weights(entry["file"])]
    wanted = dict.fromkeys([*weights, "config.json", *stored.parts, *stored.files.values()])
    named = {entry["file"] for entry in record["outputs"]}
    told = _Told(progress)
    intact(out, [name for name in wanted if name in named or name != "config.json"], told.checked)
    return _write(out, task, stored, target, opened, record, overwrite, out_shard_size, told)


class _Told:
    """Reports progress: adds up checked and restored bytes."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._checked = self._restored = self._total = 0

    def checked(self, done: int, total: int) -> None:
        """Set the bytes checked so far, and their total."""
        self._checked, self._total = done, total
        self._tell()

    def restored(self, count: int) -> None:
        """Add written bytes."""
        self._restored += count
        self._tell()

    def begin(self, nbytes: int) -> None:
        """Set how many bytes will be written."""
        self._total = self._checked + nbytes

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._checked + self._restored, self._total)


def _write(
    out: Path,
    task: str,
    stored: StoredTask,
    target: Path,
    base: Checkpoint | None,
    record: Mapping[str, Any],
    overwrite: bool,
    shard_bytes: int,
    told: _Told,
) -> Restored:
    """Write the checkpoint into a folder next to the target, and rename it."""
    from ...checkpoint import INDEX_NAME, index_json, plan_shards
    from ..output.staging import Staging
    from .read import Restorer, open_parts

    merged = open_checkpoint(str(out))
    parts = open_parts([out / name for name in stored.parts])
    with merged.reader() as reader:
        restorer = Restorer(out, stored, merged, parts, base, reader)
        shards = plan_shards([(t.name, t.dtype, restorer.shape(t)) for t in stored.tensors], shard_bytes, {})
        told.begin(sum(shard.size for shard in shards))
        beside = sum((out / path).stat().st_size for path in stored.files.values())
        staging = Staging(target, shards, f"restore {task}", beside=beside, overwrite=overwrite, fresh=True)
        try:
            places = {name: (i, at) for i, shard in enumerate(shards) for name, (at, _) in shard.entries.items()}
            _write_tensors(stored, restorer, staging, places, told)
            staging.claim([INDEX_NAME, *stored.files, RECORD_NAME])
            if len(shards) > 1:
                (staging.folder / INDEX_NAME).write_bytes(index_json(shards))
            for name, path in stored.files.items():
                copy_file(out / path, staging.folder / name)
            names = [*(shard.name for shard in shards), *([INDEX_NAME] if len(shards) > 1 else []), *stored.files]
            written = _write_record(out, task, stored, record, staging.folder, names, restorer)
            warnings = staging.publish()
        except OSError as error:
            staging.remove()
            raise error if isinstance(error, CheckpointError) else staging.write_error(error) from None
        except BaseException:
            staging.remove()
            raise
    return Restored(target, written, tuple(warnings))


def _write_tensors(
    stored: StoredTask, restorer: Restorer, staging: Staging, places: Mapping[str, tuple[int, int]], told: _Told
) -> None:
    import torch

    # one thread, as when the parts were made: results depend on the number
    with one_thread():
        for tensor in stored.tensors:
            shard, offset = places[tensor.name]
            for start, piece in restorer.pieces(tensor):
                data = piece.contiguous().view(torch.uint8).numpy().data
                staging.write(shard, offset + start * tensor.dtype.itemsize, data)
                told.restored(data.nbytes)


def _write_record(
    out: Path,
    task: str,
    stored: StoredTask,
    record: Mapping[str, Any],
    folder: Path,
    names: list[str],
    restorer: Restorer,
) -> dict[str, Any]:
    """Write the record of a restored checkpoint, with hashes that `verify` checks."""
    import math
    import time

    from ...version import __version__

    described: dict[str, Any] = next((each for each in record["sidecars"]["tasks"] if each["name"] == task), {})
    written = {
        "format": RECORD_FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"merganser": __version__, f"method {stored.method.name}": str(stored.method.version)},
        "restored": {"from": str(out.resolve()), "method": stored.method.name, "task": described},
        "parameters": sum(math.prod(restorer.shape(t)) for t in stored.tensors if t.dtype.kind == "float"),
        "tensors": len(stored.tensors),
        "dtypes": sorted({tensor.dtype.name for tensor in stored.tensors}),
        "outputs": [
            {"file": n, "bytes": (folder / n).stat().st_size, "sha256": sha256_of_file(folder / n)} for n in names
        ],
    }
    (folder / RECORD_NAME).write_text(record_text(written), encoding="utf-8")
    return written


def read_sidecar_record(out: Path) -> dict[str, Any]:
    """Return the run record of an output with sidecars."""
    if not out.is_dir():
        raise NotFoundError(f"{out}: {'is not a folder' if out.exists() else 'no such folder'}")
    path = out / RECORD_NAME
    if not path.exists():
        raise NotFoundError(f"{out}: has no {RECORD_NAME}; only what merganser wrote can be restored from")
    record = read_object(path)
    if "sidecars" not in record:
        from ...method.registry import methods

        known = ", ".join(name for name, method in methods().items() if method.sidecar is not None)
        raise NotFoundError(
            f"{out}: has no sidecars: {record.get('method', 'what wrote it')} stores nothing for single tasks; "
            f"methods that do are {known}"
        )
    Entry(record, str(path))["sidecars"]["tasks"].each(_check_task)
    return record


def _check_task(entry: Entry) -> None:
    """Check the fields of a task's entry that are shown after restoring."""
    entry["name"].text()
    if entry.get("error") is not None:
        entry["error"].number()
        error = entry.get("error_of_task_vector")
        if error is not None:
            error.number()


def intact(out: Path, files: list[str], progress: Progress | None = None) -> None:
    """Compare files of an output with the hashes in its run record.

    Raises:
        CheckpointError: A file differs, or is missing.
    """
    for file in verify(out, files=files, progress=progress).files:
        if file.problem is not None:
            raise CheckpointError(f"{out / file.file}: {file.problem}; fetch the output again, or merge again")


def open_base(out: Path, task: str, stored: StoredTask, given: str | None, cache_dir: Path | None) -> Checkpoint:
    """Open the base: the given one, else the one that was merged."""
    if given is not None:
        return open_checkpoint(given, cache_dir=cache_dir)
    assert stored.base is not None  # checked when the index was read
    path, model, revision = (stored.base.get(key) for key in ("path", "model", "revision"))
    try:
        if path is not None:
            return open_checkpoint(path)
        return open_checkpoint(str(model), revision=revision, cache_dir=cache_dir)
    except NotFoundError as error:
        raise NotFoundError(
            f"{out}: {task} is restored with the base of the merge, {path or model}, and that was not found; "
            f"say where it is with --base ({error})"
        ) from None


def _beside(out: Path, task: str) -> Path:
    # "." has an empty name
    named = out if out.name else out.resolve()
    return named.with_name(f"{named.name}-{task}")


def refuse_source(target: Path, source: Path) -> None:
    """Refuse a target that contains what is read."""
    from ..output.staging import lies_in, resolve_target

    if lies_in(source, resolve_target(target)):
        raise OutputError(f"{target}: {source}, which is read, is in this folder; choose another target")


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))
