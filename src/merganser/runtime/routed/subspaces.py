"""MergeVLA's router: nothing is fitted, and one batch of inputs is enough.

Every task gets a score for an input: how strongly the hidden states of that task's model lie in the directions that some
named weights read most, the leading right singular vectors of each. The highest score wins. The weights may be those of
any part of a checkpoint; hidden states come from whatever runs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import CheckpointError, NonFiniteError, ParameterError, UnsupportedError
from ...ops.linalg.spectral import svd
from .finding import open_tasks
from .tasks import TaskSet, placed

__all__ = ["SubspaceSettings", "Subspaces", "open_subspaces", "strengths_in"]

_OF = ("task", "shared", "change")

_VALUES = re.compile(r"(?P<stack>.*)\.(?P<layer>[0-9]+)\.(?:.*\.)?v_proj\.weight")


@dataclass(frozen=True, slots=True)
class SubspaceSettings:
    """What the router reads.

    Args:
        parts: The weights that are read: tensors with one of these texts in their names; None for the value projection of the
            last layer (`v_proj.weight`). MergeVLA takes those of the last layer of the action head that all tasks share.
        rank: How many right singular vectors of each weight are kept, the leading ones.
        of: Whose weight: that of each "task" (as MergeVLA's code), the "shared" model's for all (as its paper), or the
            "change" of each task, its weight minus the shared model's.

    Raises:
        ParameterError: A setting is not valid.
    """

    parts: tuple[str, ...] | None = None
    rank: int = 8
    of: Literal["task", "shared", "change"] = "task"

    def __post_init__(self) -> None:
        parts = self.parts
        if parts is not None and (
            isinstance(parts, str) or not parts or not all(isinstance(p, str) and p for p in parts)
        ):
            raise ParameterError(f"parts: must be a list of texts that names of tensors contain, found {parts!r}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ParameterError(f"rank: must be a whole number of at least 1, found {self.rank!r}")
        if self.of not in _OF:
            raise ParameterError(f"of: must be {', '.join(map(repr, _OF))}, found {self.of!r}")


@dataclass(frozen=True)
class Subspaces:
    """The directions that named weights read, of every task.

    Args:
        tasks: Names of the tasks.
        directions: By the name of the weight, shape [tasks, rank, in], float32; rows of zeros beyond the rank of a weight.
    """

    tasks: tuple[str, ...]
    directions: Mapping[str, Tensor]

    def strength(self, task: str, part: str, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return how strongly inputs lie in a task's directions: the mean over tokens of the length of the projection.

        Args:
            task: Name of the task.
            part: Name of a weight.
            states: What the weight is multiplied by, under the weights of that task, shape [rows, tokens, in].
            mask: 1 for tokens that count, shape [rows, tokens]; None if all do.

        Returns:
            Shape [rows], float32.

        Raises:
            ParameterError: The shape of the states is another one.
        """
        rows = self._directions(part)[self._index(task)]
        if states.dim() != 3 or states.shape[-1] != rows.shape[-1]:
            raise ParameterError(
                f"{part}: reads states of the shape [rows, tokens, {rows.shape[-1]}], got {list(states.shape)}"
            )
        lengths: Tensor = torch.linalg.vector_norm(states.float() @ rows.to(states.device).T, dim=-1)
        if mask is None:
            return lengths.mean(1)
        counted = mask.to(lengths.device, lengths.dtype)
        return (lengths * counted).sum(1) / counted.sum(1).clamp_min(1)

    def scores(self, states: Mapping[str, Mapping[str, Tensor]], mask: Tensor | None = None) -> Tensor:
        """Return the score of every task for every row, shape [rows, tasks], float32: the mean strength of its parts.

        Args:
            states: By task, then by the name of the weight, what the weight is multiplied by when the input passes through
                the model of that task, shape [rows, tokens, in].
            mask: 1 for tokens that count, shape [rows, tokens]; None if all do. Weights that read other tokens than the
                mask is of need none.

        Raises:
            ParameterError: The states of a task or of a weight are missing, or have another shape.
            NonFiniteError: They have NaN or infinity.
        """
        columns = []
        for task in self.tasks:
            own = states.get(task, {})
            if missing := [part for part in self.directions if part not in own]:
                raise ParameterError(f"the states that {missing[0]} reads in task {task!r} are missing")
            columns.append(
                torch.stack([self.strength(task, part, own[part], mask) for part in self.directions]).mean(0)
            )
        return _finite(torch.stack(columns, 1))

    def choose(self, states: Mapping[str, Mapping[str, Tensor]], mask: Tensor | None = None) -> list[str]:
        """Return the task of each row, with arguments as for `scores`."""
        return [self.tasks[index] for index in self.scores(states, mask).argmax(1).tolist()]

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise ParameterError(f"no task {task!r}. Tasks: {', '.join(self.tasks)}")
        return self.tasks.index(task)

    def _directions(self, part: str) -> Tensor:
        if part not in self.directions:
            raise ParameterError(f"{part}: is not among the weights that are read: {', '.join(self.directions)}")
        return self.directions[part]


def open_subspaces(out: str | Path | TaskSet, settings: SubspaceSettings | None = None) -> Subspaces:
    """Find the directions that the named weights of all tasks read.

    Args:
        out: What `open_tasks` takes, also a merge of models that transformers cannot run; or what it returned.
        settings: Which weights, and how many directions.

    Raises:
        NotFoundError: There are no sidecars and no adapters.
        CheckpointError: They are damaged; or no weight has such a name, or only some tasks have it.
        UnsupportedError: Such a weight is not a matrix, or no task changes one; or none is named, and there is not one stack of
            layers with value projections.
        NonFiniteError: A weight has NaN or infinity.
    """
    settings = SubspaceSettings() if settings is None else settings
    tasks = out if isinstance(out, TaskSet) else open_tasks(out)
    weights = {task: tasks.weights(task) for task in tasks.tasks}
    named = _named(tasks, weights[tasks.tasks[0]], settings.parts)
    shared = {} if settings.of == "task" else tasks.shared.read()
    found = {}
    for name in named:
        each: list[Tensor] = []
        for task, own in weights.items():
            if name not in own or (settings.of != "task" and name not in shared):
                where = f"task {task!r}" if name not in own else "the shared model"
                raise CheckpointError(f"{tasks.name}: {where} has no tensor {name}")
            weight = shared[name] if settings.of == "shared" else own[name]
            if weight.dim() != 2:
                raise UnsupportedError(f"{tasks.name}: {name} is not a matrix: its shape is {list(weight.shape)}")
            # in float64, so that adapters are no more than what they add
            weight = weight.double() - shared[name].double() if settings.of == "change" else weight.double()
            if not weight.isfinite().all():
                raise NonFiniteError(f"{tasks.name}: {name} has NaN or infinity in task {task!r}")
            each.append(svd(weight, settings.rank).right.T.float())
        rank = max(len(rows) for rows in each)
        if rank:
            found[name] = torch.stack(
                [torch.cat([rows, rows.new_zeros(rank - len(rows), rows.shape[1])]) for rows in each]
            )
    if not found:
        raise UnsupportedError(f"{tasks.name}: no task changes {named[0]}, nor another tensor that is to be read")
    return Subspaces(tasks.tasks, found)


def _named(tasks: TaskSet, names: Iterable[str], parts: tuple[str, ...] | None) -> list[str]:
    """Return the names of the weights that are read."""
    if parts is not None:
        found = [name for name in names if any(part in name for part in parts)]
        if not found:
            raise CheckpointError(f"{tasks.name}: no tensor has {' or '.join(map(repr, parts))} in its name")
        return found
    numbered = {name: match for name in names if (match := _VALUES.fullmatch(name))}
    stacks = {match["stack"] for match in numbered.values()}
    if len(stacks) != 1:
        seen = (
            f"several stacks of layers have one: {', '.join(sorted(stacks))}" if stacks else "there is no such tensor"
        )
        raise UnsupportedError(
            f"{tasks.name}: the value projection of the last layer (v_proj.weight) is read by default, and {seen}; name the "
            "weights that are to be read: parts"
        )
    return [max(numbered, key=lambda name: int(numbered[name]["layer"]))]


@torch.inference_mode()
def strengths_in(model: Any, subspaces: Subspaces, task: str, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Return the score of one task for every row, from the forward of its model.

    Args:
        model: The model of the task, of transformers.
        subspaces: The directions.
        task: Name of the task.
        input_ids: Tokens, shape [rows, length].
        mask: 1 for tokens and 0 for padding, in the same shape.

    Raises:
        UnsupportedError: A named weight is not that of a linear layer of the model.
        NonFiniteError: The hidden states have NaN or infinity.
    """
    modules = dict(model.named_modules())
    strengths: dict[str, Tensor] = {}
    hooks = []
    try:
        for part in subspaces.directions:
            module = modules.get(part.removesuffix(".weight"))
            if not isinstance(module, torch.nn.Linear):
                raise UnsupportedError(f"{part}: is not the weight of a linear layer in {type(model).__name__}")

            def look(module: Any, args: tuple[Any, ...], part: str = part) -> None:
                strengths[part] = subspaces.strength(task, part, args[0], mask)

            hooks.append(module.register_forward_pre_hook(look))
        model.base_model(**placed(model.base_model, input_ids, mask), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if unread := [part for part in subspaces.directions if part not in strengths]:
        raise UnsupportedError(f"{unread[0]}: is not used when text passes through {type(model).__name__}")
    return _finite(torch.stack([strengths[part] for part in subspaces.directions]).mean(0)).cpu()


def _finite(scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise NonFiniteError("the hidden states have NaN or infinity, so no task can be chosen by them")
    return scores
