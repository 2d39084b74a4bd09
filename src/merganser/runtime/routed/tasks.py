"""What a routed model chooses among, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...inference.stored import Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TaskSet", "Weights"]


class Weights(Mapping[str, "Tensor"]):
    """The tensors of a task, by name, each computed when it is asked for and not kept.

    Args:
        names: Their names.
        read: Computes one.
        shared: Names of those that are the shared model's, bit for bit.
    """

    def __init__(self, names: tuple[str, ...], read: Callable[[str], Tensor], shared: frozenset[str]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read
        self.shared = shared

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class TaskSet:
    """Tasks that a routed model chooses among.

    Args:
        name: What the user calls it.
        kind: "sidecars" or "adapters".
        tasks: Names of the tasks.
        shared: The model whose hidden states a router reads: the merged model, or the base of the adapters.
        sources: The model of each task.
        weights: Returns the tensors of a task.
        router: The file of the router.
        recorded: The folder whose run record lists the router; None if there is no record.
    """

    name: str
    kind: str
    tasks: tuple[str, ...]
    shared: Source
    sources: Mapping[str, Source]
    weights: Callable[[str], Weights]
    router: Path
    recorded: Path | None
