"""What a routed model chooses among, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...inference.stored import Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Factors", "Mix", "TaskSet", "Weights", "blended", "no_factors", "padded", "placed", "told_tasks"]

Factors = tuple["Tensor", "Tensor"]
"""Left and right factors of a change of a weight: shapes [out, r] and [r, in]."""

Mix = tuple[tuple[str, float], ...]
"""Tasks with their shares, the largest first; the shares add up to 1."""


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


def blended(parts: Sequence[tuple[Weights, float]]) -> Weights:
    """Return the weighted sum of several tasks' tensors, computed in float32 and rounded once.

    Args:
        parts: The tensors of each task, and its share; the shares add up to 1.

    Raises:
        CheckpointError: The tasks have different tensors.
    """
    first = parts[0][0]
    for own, _ in parts[1:]:
        if own.keys() != first.keys():
            name = min(own.keys() ^ first.keys())
            raise CheckpointError(f"{name}: only some of the tasks have this tensor, so they cannot be blended")
    shared = frozenset.intersection(*(own.shared for own, _ in parts))

    def read(name: str) -> Tensor:
        values = first[name]
        if name in shared:
            return values
        total = values.float() * parts[0][1]
        for own, share in parts[1:]:
            more = own[name]
            if more.shape != values.shape:
                raise CheckpointError(f"{name}: the tasks have different shapes here, so they cannot be blended")
            total += more.float() * share
        return total.to(values.dtype)

    return Weights(tuple(first), read, shared)


def no_factors(task: str, name: str) -> Factors | None:
    """Return None: nothing is stored as factors."""
    return None


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the tokens of several texts, padded on the right, and a mask with 1 for tokens, both of shape [texts, longest]."""
    import torch

    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    return ids, torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])


def placed(model: Any, input_ids: Tensor, mask: Tensor | None) -> dict[str, Tensor | None]:
    """Return the arguments of a model's forward, with positions that do not count padding on the left.

    Args:
        model: A model of transformers.
        input_ids: Tokens, shape [rows, length].
        mask: 1 for tokens and 0 for padding, in the same shape; None without padding.
    """
    found = {"input_ids": input_ids, "attention_mask": mask}
    padded_left = mask is not None and not bool(mask[:, 0].all())
    if mask is not None and padded_left and "position_ids" in signature(model.forward).parameters:
        found["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    return found


def told_tasks(named: Mapping[str, Sequence[str]], tasks: Sequence[str]) -> dict[str, str]:
    """Return the task that belongs to each of several texts; texts that have none are left out.

    Args:
        named: By the name of a text, names that its task may have; the first that there is counts.
        tasks: Names of the tasks.
    """
    found = {text: next((name for name in names if name in tasks), None) for text, names in named.items()}
    return {text: task for text, task in found.items() if task is not None}


@dataclass(frozen=True)
class TaskSet:
    """Tasks that a routed model chooses among.

    Args:
        name: What the user calls it.
        kind: "sidecars", "adapters" or "models".
        tasks: Names of the tasks.
        shared: The model whose hidden states a router reads: the merged model, or the base of adapters or models.
        sources: The model of each task.
        weights: Returns the tensors of a task.
        router: The file of the router.
        recorded: The folder whose run record lists the router; None if there is no record.
        factors: Returns what a task adds to a weight of the shared model, by its name, where that is stored as factors;
            else None.
    """

    name: str
    kind: str
    tasks: tuple[str, ...]
    shared: Source
    sources: Mapping[str, Source]
    weights: Callable[[str], Weights]
    router: Path
    recorded: Path | None
    factors: Callable[[str, str], Factors | None] = no_factors
