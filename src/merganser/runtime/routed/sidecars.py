"""The tasks of a merge with sidecars: tensors are restored from their parts in memory, one at a time."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint import Reader, open_checkpoint
from ...engine.plan.sections.sidecars import INDEX_FILE
from ...engine.sidecars.codec import OWN
from ...engine.sidecars.read import Restorer, open_parts, read_task
from ...engine.sidecars.restoration import intact, open_base, read_sidecar_record
from ...inference.stored import open_stored
from ...jsonfile import Entry, read_object
from ...process import one_thread
from .tasks import TaskSet, Weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ROUTER_FILE", "sidecar_tasks"]

ROUTER_FILE = "sidecars/router.safetensors"


def sidecar_tasks(out: Path, cache_dir: Path | None) -> TaskSet:
    """Open the tasks of a merge with sidecars.

    Raises:
        CheckpointError: The sidecars are damaged.
    """
    index = out / INDEX_FILE
    entries = Entry(read_object(index), str(index))["tasks"]
    tasks: tuple[str, ...] = tuple(entries.each(lambda entry: entry["name"].text()))
    sources = {task: open_stored(f"{out}#{task}", cache_dir=cache_dir) for task in tasks}
    opened = _Opened(out, cache_dir)
    return TaskSet(
        str(out),
        "sidecars",
        tasks,
        open_stored(out, cache_dir=cache_dir),
        sources,
        lru_cache(maxsize=None)(opened.weights),
        out / ROUTER_FILE,
        out,
    )


class _Opened:
    """A merge whose files stay open while its tasks change.

    Args:
        out: Its folder.
        cache_dir: Folder for models from the Hub.
    """

    def __init__(self, out: Path, cache_dir: Path | None) -> None:
        self._out = out
        self._cache_dir = cache_dir
        self._reader = Reader()

    def weights(self, task: str) -> Weights:
        """Return the tensors of a task, after its files were compared with the hashes of the merge.

        Raises:
            CheckpointError: A file is damaged, or the base is not that of the merge.
        """
        out = self._out
        record = read_sidecar_record(out)
        stored = read_task(out, read_object(out / INDEX_FILE), task)
        merged = open_checkpoint(str(out))
        weights = [path.relative_to(out).as_posix() for path in merged.weight_files]
        listed = {entry["file"] for entry in record["outputs"]}
        intact(out, sorted(listed & {INDEX_FILE, *weights, *stored.parts, *stored.files.values()}))
        base = None
        if any(tensor.base is not None for tensor in stored.tensors):
            base = open_base(out, task, stored, None, self._cache_dir)
        parts = open_parts([out / name for name in stored.parts])
        restorer = Restorer(out, stored, merged, parts, base, self._reader)
        by_name = {tensor.name: tensor for tensor in stored.tensors}
        same = frozenset(
            tensor.name
            for tensor in stored.tensors
            if tensor.kept not in (None, OWN) and tensor.dtype == merged.tensors[tensor.name].dtype
        )

        def read(name: str) -> Tensor:
            import torch

            tensor = by_name[name]
            shape = restorer.shape(tensor)
            values = torch.empty(shape, dtype=getattr(torch, tensor.dtype.name)).reshape(-1)
            # one thread, as when the parts were made: results depend on the number
            with one_thread():
                for start, piece in restorer.pieces(tensor):
                    values[start : start + piece.numel()] = piece
            return values.view(shape)

        return Weights(tuple(by_name), read, same)
