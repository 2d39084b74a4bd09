"""A router of whole texts: the mean of hidden states to the task they belong to, as a small file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...errors import CheckpointError, NonFiniteError, NotFoundError, ParameterError, UnsupportedError
from ...mixture.fitted import ridge_rows
from .tasks import Mix

__all__ = ["TaskRouter", "fit_router", "mix_of", "read_router"]

FORMAT = "1"
_PARTS = 20
"""Shares are multiples of one of so many parts."""


@dataclass(frozen=True)
class TaskRouter:
    """A row per task; a text belongs to the task whose row has the largest product with its mean hidden state.

    Args:
        tasks: Names of the tasks.
        rows: Shape [tasks, hidden], float32.
        shared: Hash of the shared model, whose hidden states the router reads.
    """

    tasks: tuple[str, ...]
    rows: Tensor
    shared: str

    def choose(self, means: Tensor) -> list[str]:
        """Return the task of each text.

        Args:
            means: Mean of the hidden states of each text, shape [texts, hidden].
        """
        return [self.tasks[index] for index in (means.float().cpu() @ self.rows.T).argmax(1).tolist()]

    def mixes(self, means: Tensor, most: int) -> list[Mix]:
        """Return the tasks of each text with their shares: of the predictions above zero, the largest.

        Shares are rounded to twentieths, so that texts which need almost the same weights share them.

        Args:
            means: Mean of the hidden states of each text, shape [texts, hidden].
            most: Most tasks of a text.
        """
        return [mix_of(self.tasks, row, most) for row in (means.float().cpu() @ self.rows.T).tolist()]

    def to_bytes(self) -> bytes:
        """Return the router as a file of safetensors."""
        metadata = {"format": FORMAT, "tasks": json.dumps(self.tasks), "shared": self.shared}
        return save({"rows": self.rows}, metadata)


def mix_of(tasks: Sequence[str], scores: Sequence[float], most: int) -> Mix:
    """Return the tasks of the largest scores with their shares, in twentieths; the best alone if no other is above zero.

    Args:
        tasks: Names of the tasks.
        scores: A score per task; shares are proportional to those above zero.
        most: Most tasks.
    """
    order = sorted(range(len(tasks)), key=lambda task: (-scores[task], task))[:most]
    above = [max(0.0, scores[task]) for task in order]
    if sum(above) <= 0:
        return ((tasks[order[0]], 1.0),)
    parts = [round(_PARTS * each / sum(above)) for each in above]
    # what rounding adds or takes away belongs to the best
    parts[0] += _PARTS - sum(parts)
    return tuple((tasks[task], part / _PARTS) for task, part in zip(order, parts, strict=True) if part)


def fit_router(tasks: Sequence[str], states: Sequence[Tensor], shared: str, ridge: float = 0.1) -> TaskRouter:
    """Fit a router by ridge regression from each hidden state to the task of its text; tasks count alike.

    Args:
        tasks: Names of the tasks.
        states: For each task, hidden states of its texts, shape [tokens, hidden].
        shared: Hash of the model that they are of.
        ridge: Regularisation, relative to the mean square of the states.

    Raises:
        ParameterError: A task has no states, or `ridge` is not a positive number.
        NonFiniteError: The regression gives NaN or infinity.
    """
    if not 0 < ridge < float("inf"):
        raise ParameterError(f"ridge must be a positive number, found {ridge}")
    if empty := [task for task, own in zip(tasks, states, strict=True) if not len(own)]:
        raise ParameterError(f"the router needs text of every task; that of {empty[0]!r} is empty")
    gram = torch.stack([own.double().T @ own.double() / len(own) for own in states]).sum(0)
    rows = ridge_rows(gram, torch.stack([own.double().mean(0) for own in states]), ridge)
    if not rows.isfinite().all():
        raise NonFiniteError("the ridge regression of the router gives NaN or infinity")
    return TaskRouter(tuple(tasks), rows, shared)


def read_router(path: Path, tasks: Sequence[str], hidden: int, shared: str) -> TaskRouter:
    """Read a router, and check that it belongs to a merge.

    Args:
        path: The file.
        tasks: Tasks of the merge.
        hidden: Hidden size of its model.
        shared: Hash of its shared model.

    Raises:
        NotFoundError: There is no such file.
        UnsupportedError: It is of a later version.
        CheckpointError: It is damaged, or was made for another merge.
    """
    if not path.exists():
        raise NotFoundError(f"{path}: no such router; make one from text with fit(), or set the task")
    again = "make the router again"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            rows = file.get_tensor("rows") if "rows" in file.keys() else None  # noqa: SIM118
        named = json.loads(metadata.get("tasks", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged, or no router: {error}; {again}") from None
    if rows is None or "format" not in metadata:
        raise CheckpointError(f"{path}: is not a router: it has no tensor 'rows' with a format; {again}")
    if metadata["format"] != FORMAT:
        raise UnsupportedError(f"{path}: format {metadata['format']} is of a later version; this one reads {FORMAT}")
    if named != list(tasks):
        raise CheckpointError(f"{path}: is for the tasks {named}, the merge has {list(tasks)}; {again}")
    if metadata.get("shared") != shared:
        raise CheckpointError(f"{path}: was made for another shared model; {again}")
    if rows.dtype != torch.float32 or tuple(rows.shape) != (len(tasks), hidden):
        raise CheckpointError(
            f"{path}: rows are {rows.dtype} {list(rows.shape)}, must be float32 {[len(tasks), hidden]}; {again}"
        )
    if not rows.isfinite().all():
        raise CheckpointError(f"{path}: rows contain NaN or infinity; {again}")
    return TaskRouter(tuple(tasks), rows, shared)
