"""A base with several adapters as tasks: each tensor is computed when it is asked for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ...adapters import open_reference
from ...checkpoint import Reader
from ...errors import CheckpointError
from ...inference.stored import open_stored
from ...jsonfile import Entry, read_object
from ...record.format import RECORD_NAME
from .tasks import TaskSet, Weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["adapter_tasks"]

ROUTER_FILE = "router.safetensors"


def adapter_tasks(folder: Path, tasks: tuple[str, ...], base: str | None, name: str, cache_dir: Path | None) -> TaskSet:
    """Open adapters as tasks; each is named after its folder.

    Args:
        folder: The folder that holds theirs.
        tasks: The names of their folders.
        base: The model that they are applied to; None for the one that they name.
        name: What the user calls them.
        cache_dir: Folder for models from the Hub.

    Raises:
        CheckpointError: They name different bases, or none, or do not fit the base.
    """
    if base is None:
        base = _base(folder, tasks)
    sources = {task: open_stored(f"{base}+{folder / task}", cache_dir=cache_dir) for task in tasks}
    # files stay open while tasks change
    reader = Reader()
    shared = open_reference(base, cache_dir=cache_dir)

    def weights(task: str) -> Weights:
        tensors = open_reference(f"{base}+{folder / task}", cache_dir=cache_dir).tensors

        def read(name: str) -> Tensor:
            return reader.tensor(tensors[name])

        same = frozenset(
            name for name, tensor in tensors.items() if tensor.source is None and tensor == shared.tensors.get(name)
        )
        return Weights(tuple(tensors), read, same)

    return TaskSet(
        name,
        "adapters",
        tasks,
        open_stored(base, cache_dir=cache_dir),
        sources,
        lru_cache(maxsize=None)(weights),
        folder / ROUTER_FILE,
        folder if (folder / RECORD_NAME).exists() else None,
    )


def _base(folder: Path, tasks: tuple[str, ...]) -> str:
    """Return the base that the adapters name."""
    named = {}
    for task in tasks:
        path = folder / task / "adapter_config.json"
        entry = Entry(read_object(path), str(path)).get("base_model_name_or_path")
        if entry is None or entry.shown() in ("None", "null"):
            raise CheckpointError(f"{path}: names no base (base_model_name_or_path); give it: BASE+{folder}")
        named[task] = entry.text()
    first = named[tasks[0]]
    other = next((task for task in tasks if named[task] != first), None)
    if other is not None:
        raise CheckpointError(
            f"{folder}: {tasks[0]} is an adapter of {first}, {other} of {named[other]}; adapters of one base can be routed. "
            f"If these are the same model, name it: BASE+{folder}"
        )
    return first
