"""The loss of one sequence, as a method defines it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...method import Learning, takes
from ..data.batches import Batch, Padded
from ..reverse.loss import predicted
from .teachers import Teachers

__all__ = ["Losses"]


class _Scaled:
    """A loss of tokens, times a factor."""

    def __init__(self, function: Callable[..., Tensor], given: Mapping[str, Any], factor: float) -> None:
        self._function = function
        self._given = given
        self._factor = factor

    def of(self, logits: Tensor, sequence: Padded) -> Tensor:
        """Return the sum over the predicted tokens of a sequence, 0-d, given logits [1, longest, vocabulary]."""
        used = predicted(sequence).nonzero()[:, 0]
        given = {**self._given, "logits": _rows(logits, used), "labels": sequence.ids[0, 1:][used]}
        if "teacher" in given:
            given["teacher"] = _rows(given["teacher"], used)
        return self._factor * self._function(**{name: given[name] for name in takes(self._function)}).sum()


def _rows(logits: Tensor, used: Tensor) -> Tensor:
    """Return the logits at some positions of one sequence, float32, copied once, and their gradient once."""
    return logits.flatten(0, 1).index_select(0, used).float()


class Losses:
    """The losses of the sequences of a step: of each model the mean over its tokens, times its weight.

    Args:
        learning: The loss of a token.
        settings: Parameters of the method, by the names of arguments.
        weight: The factor of each model.
        teachers: The models' own predictions, if the loss compares with them.
        owners: For every sequence its model, and its number among the model's.
        batches: The sequences.
    """

    def __init__(
        self,
        learning: Learning,
        settings: Mapping[str, Any],
        weight: Sequence[float],
        teachers: Teachers | None,
        owners: Sequence[tuple[int, int]],
        batches: Sequence[Batch],
    ) -> None:
        self._learning = learning
        self._settings = settings
        self._weight = weight
        self._teachers = teachers
        self._owners = owners
        self._tokens = [0] * len(weight)
        for (model, _), batch in zip(owners, batches, strict=True):
            self._tokens[model] += int(predicted(batch.stacks[-1]).sum())

    def of(self, number: int) -> _Scaled:
        """Return the loss of a sequence; the weights outside the blocks of the merged model must be loaded."""
        model, own = self._owners[number]
        given = {} if self._teachers is None else {"teacher": self._teachers.logits(model, own)}
        factor = self._weight[model] / self._tokens[model]
        return _Scaled(self._learning.loss, {**self._settings, **given}, factor)

    def by_model(self) -> list[list[int]]:
        """Return the numbers of the sequences of each model, in turn."""
        return [
            [number for number, (owner, _) in enumerate(self._owners) if owner == model]
            for model in range(len(self._weight))
        ]

    def means(self, values: Sequence[float]) -> list[float | None]:
        """Return the mean loss of each model's tokens, given those of all sequences; None for a model without any."""
        totals = [0.0] * len(self._weight)
        for (model, _), value in zip(self._owners, values, strict=True):
            totals[model] += value
        return [total / own if own else None for total, own in zip(totals, self._weight, strict=True)]
