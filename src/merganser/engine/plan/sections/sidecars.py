"""The plan of the sidecars as data: what is stored to restore each task's model, and where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ....checkpoint import Shard
from ....recipe import ModelReference

if TYPE_CHECKING:
    pass

FOLDER = "sidecars"
"""Folder in an output for its sidecars."""

INDEX_FILE = f"{FOLDER}/index.json"

SHARED = -1
"""Owner index of parts stored once for all tasks; a task's own parts have its position as owner."""


@dataclass(frozen=True, slots=True)
class Place:
    """Location of a part of a tensor in the sidecar files.

    Args:
        shard: Index of its sidecar file.
        offset: Position of its first byte in the file.
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
        reference: The model's reference in the recipe.
        nbytes: Size of its sidecar files, bytes.
        full_bytes: Size of its tensors in a full checkpoint, bytes.
    """

    name: str
    reference: ModelReference
    nbytes: int
    full_bytes: int

    @property
    def model(self) -> str:
        """The model's name in the recipe."""
        return str(self.reference)


@dataclass(frozen=True, eq=False)
class SidecarPlan:
    """What is stored besides the merged model.

    Args:
        tasks: The tasks, in the order of the models.
        shards: All sidecar files: the shared ones first, then task by task.
        owners: For each file, its task's position, or SHARED.
        kept: For each tensor without parts, by name: "own" (a copy is stored) or "merged" (the merged tensor is used).
        needs_base: Whether restoring needs the base.
        workers: Threads that make the sidecars.
        peak_memory: Largest resident memory besides Python and torch, bytes.
        bytes_read: Bytes read from the inputs and the merged model.
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
        """Size of the shared files, bytes."""
        return sum(shard.size for shard, owner in zip(self.shards, self.owners, strict=True) if owner == SHARED)

    @property
    def bytes_written(self) -> int:
        """Size of all files, bytes."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def _places(self) -> dict[str, dict[tuple[int, str], Place]]:
        places: dict[str, dict[tuple[int, str], Place]] = defaultdict(dict)
        for index, (shard, owner) in enumerate(zip(self.shards, self.owners, strict=True)):
            for name, (offset, nbytes) in shard.entries.items():
                places[name.rpartition(".")[0]][owner, name] = Place(index, offset, nbytes)
        return places

    def places_of(self, tensor: str) -> dict[tuple[int, str], Place]:
        """Return the location of each part of a tensor, by owner and the part's name."""
        return self._places.get(tensor, {})
