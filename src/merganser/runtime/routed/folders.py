"""A base with several adapters, or several fine-tunes of it, as tasks: each tensor is computed when it is asked for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ...adapters import is_adapter, open_reference
from ...adapters.rows import added_factors
from ...checkpoint import Reader
from ...errors import CheckpointError
from ...inference.stored import open_stored
from ...jsonfile import Entry, read_object
from ...record.format import RECORD_NAME
from .tasks import Factors, TaskSet, Weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["folder_tasks", "is_model"]

ROUTER_FILE = "router.safetensors"


def is_model(folder: Path) -> bool:
    """Return whether a folder holds a model of its own."""
    return (folder / "config.json").is_file() and not is_adapter(str(folder))


def folder_tasks(folder: Path, tasks: tuple[str, ...], base: str | None, name: str, cache_dir: Path | None) -> TaskSet:
    """Open adapters, or fine-tunes of one base, as tasks; each is named after its folder.

    Args:
        folder: The folder that holds theirs.
        tasks: The names of their folders.
        base: The shared model; None for the one that the adapters name.
        name: What the user calls them.
        cache_dir: Folder for models from the Hub.

    Raises:
        CheckpointError: They name different bases, or none, or do not fit the base.
    """
    models = is_model(folder / tasks[0])
    if base is None:
        base = _base(folder, tasks)
    references = {task: str(folder / task) if models else f"{base}+{folder / task}" for task in tasks}
    sources = {task: open_stored(reference, cache_dir=cache_dir) for task, reference in references.items()}
    # files stay open while tasks change
    reader = Reader()
    shared = open_reference(base, cache_dir=cache_dir)
    opened = lru_cache(maxsize=None)(lambda task: open_reference(references[task], cache_dir=cache_dir).tensors)

    def weights(task: str) -> Weights:
        tensors = opened(task)

        def read(name: str) -> Tensor:
            return reader.tensor(tensors[name])

        same = frozenset(
            name for name, tensor in tensors.items() if tensor.source is None and tensor == shared.tensors.get(name)
        )
        return Weights(tuple(tensors), read, same)

    def factors(task: str, name: str) -> Factors | None:
        tensor, plain = opened(task).get(name), shared.tensors.get(name)
        return None if tensor is None or plain is None else added_factors(tensor, plain, reader)

    return TaskSet(
        name,
        "models" if models else "adapters",
        tasks,
        open_stored(base, cache_dir=cache_dir),
        sources,
        lru_cache(maxsize=None)(weights),
        folder / ROUTER_FILE,
        folder if (folder / RECORD_NAME).exists() else None,
        factors,
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
