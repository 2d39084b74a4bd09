"""What is stored for each task beside the merged model, and where, as data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ...checkpoint import Shard
from ...recipe import ModelReference

if TYPE_CHECKING:
    pass

FOLDER = "sidecars"
"""Folder of an output that holds its sidecars."""

INDEX_FILE = f"{FOLDER}/index.json"

SHARED = -1
"""Owner of the parts that are stored once for all tasks; those of a task belong to its position."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part lies.

    Args:
        shard: Index among the files of the sidecars.
        offset: Its first byte in the file.
        nbytes: Its size, bytes.
    """

    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One task: a model that can be restored.

    Args:
        name: Its name.
        reference: Its model in the recipe.
        nbytes: Size of the files of its parts.
        full_bytes: Size of its tensors, as a copy would take.
    """

    name: str
    reference: ModelReference
    nbytes: int
    full_bytes: int

    @property
    def model(self) -> str:
        """The model as the recipe names it."""
        return str(self.reference)


@dataclass(frozen=True, eq=False)
class SidecarPlan:
    """What is stored beside the shared model.

    Args:
        tasks: The tasks, in the order of the models.
        shards: All files: those of what is shared first, then task by task.
        owners: For each file its task's position, or SHARED.
        kept: What stands for each tensor that is not treated, by name ("own" or "merged").
        needs_base: Whether restoring takes the base.
        workers: Threads that make them.
        peak_memory: Largest resident memory beside Python and torch, bytes.
        bytes_read: Bytes read from the models and from the shared model.
    """

    tasks: tuple[PlannedTask, ...]
    shards: tuple[Shard, ...]
    owners: tuple[int, ...]
    kept: Mapping[str, str]
    needs_base: bool
    workers: int
    peak_memory: int
    bytes_read: int

    @property
    def shared_bytes(self) -> int:
        """Size of the files of what is shared."""
        return sum(shard.size for shard, owner in zip(self.shards, self.owners, strict=True) if owner == SHARED)

    @property
    def bytes_written(self) -> int:
        """Size of all files."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def _places(self) -> dict[str, dict[tuple[int, str], Place]]:
        found: dict[str, dict[tuple[int, str], Place]] = defaultdict(dict)
        for index, (shard, owner) in enumerate(zip(self.shards, self.owners, strict=True)):
            for name, (offset, nbytes) in shard.entries.items():
                found[name.rpartition(".")[0]][owner, name] = Place(index, offset, nbytes)
        return found

    def places_of(self, tensor: str) -> dict[tuple[int, str], Place]:
        """Return where the parts of a tensor lie, by owner and their name in the file."""
        return self._places.get(tensor, {})
