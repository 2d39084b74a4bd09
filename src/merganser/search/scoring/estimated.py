"""Estimated figures of a trial that saw the first wave of items only, from what other models answered on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import TaskError, UnsupportedError, did_you_mean
from ...evaluation.scoring.estimate import Estimate, mean
from ...evaluation.scoring.tasks import ChoiceTask
from ..estimators import ESTIMATORS, Items, Seen, fit_ability, fit_items, read_parameters
from ..estimators.control_variate import with_control
from ..estimators.irt import Numbers
from .bench import Model
from .items import Table
from .objectives import Bound, Objective

_WHOLE = 8
"""Trials that are scored on all items before parameters are fitted to their answers."""
CONTROL = "control_variate"
"""The estimator that takes any figure, and is corrected by the models that are merged."""
_NAMES = (CONTROL, *ESTIMATORS)
_METRIC = "accuracy"
_COLUMN = "correct"


def check_estimator(name: str | None, parameters: Path | None, *, command: bool, early_stopping: bool) -> None:
    """Check options that belong together.

    Args:
        name: Name of the estimator; None for none.
        parameters: File with parameters of items.
        command: Whether an external command judges.
        early_stopping: Whether trials may end early.

    Raises:
        UnsupportedError: The estimator is not known.
        TaskError: The options contradict each other.
    """
    if name is None:
        if parameters is not None:
            raise TaskError("item-parameters: are for an estimator; give --estimator, too")
        return
    if name not in _NAMES:
        near = did_you_mean(name, _NAMES)
        raise UnsupportedError(f"estimator: {name!r} is not known.{near} Known: {', '.join(_NAMES)}")
    if name == CONTROL and parameters is not None:
        raise TaskError(f"item-parameters: are of item response theory; {CONTROL} has none, so leave them out")
    if command:
        raise TaskError("estimator: needs the answers to each item (--tasks); a command gives only figures")
    if not early_stopping:
        raise TaskError("estimator: ends trials early, which --no-early-stopping forbids; give one of them")


class Estimated:
    """Estimates the figures of trials.

    Args:
        name: `CONTROL`, or one of `ESTIMATORS`.
        table: The scores; for one of `ESTIMATORS` all tasks have questions.
        parents: The models that are merged, which are scored on all items.
        parameters: File with parameters of the items; None to fit them to the table.

    Raises:
        TaskError: A task is not of questions, or the file is wrong.
    """

    def __init__(self, name: str, table: Table, parents: Sequence[Model], parameters: Path | None) -> None:
        for split in table.splits.values():
            if name != CONTROL and not isinstance(split.task, ChoiceTask):
                raise TaskError(
                    f"estimator: {name} is for right and wrong answers, and {split.task.source} is a "
                    f"{'text' if split.task.kind == 'text' else 'task of lm-eval'}; leave out --estimator, or that task"
                )
        self.parents = tuple(parents)
        self._estimate, self._table = ESTIMATORS.get(name), table
        self._given: dict[str, Items] | None = None
        if parameters is not None:
            counts = {task: len(split.prepared.items) for task, split in table.splits.items()}
            whole = read_parameters(parameters, counts)
            self._given = {task: items.at(self._order(task)) for task, items in whole.items()}
        self._fitted: tuple[tuple[str, ...], dict[str, Items]] = ((), {})

    def check(self, objectives: Sequence[Objective], bounds: Sequence[Bound]) -> None:
        """Check that what a search asks for can be estimated.

        Raises:
            TaskError: There are several objectives, or a figure that is not estimated.
        """
        if len(objectives) > 1:
            raise TaskError("estimator: takes one objective, because it compares each trial with the best one")
        if self._estimate is None:
            return
        names = [name for _, name in objectives[0].terms] + [bound.name for bound in bounds]
        known = [f"{task}/{_METRIC}" for task in self._table.splits]
        for name in names:
            task, _, metric = name.rpartition("/")
            if task in self._table.splits and metric != _METRIC:
                raise TaskError(f"estimator: {name} is not estimated; estimated: {', '.join(known)}")

    def figures(self, key: str) -> dict[str, Estimate] | None:
        """Return the figures of a model over all items of trials; None while too few models were scored on all of them.

        Args:
            key: Key of the model, which was scored on the first wave.
        """
        if self._estimate is None:
            return self._by_parents(key)
        # without the model itself, whose scores may be left from a run that was killed
        whole = [other for other in self._table.whole() if other != key]
        trials = [other for other in whole if not other.startswith("model ")]
        if self._given is None and len(trials) < _WHOLE:
            return None
        items = self._given if self._given is not None else self._fit(tuple(whole))
        found = {}
        for task, own in items.items():
            first = len(self._table.splits[task].items(0))
            parents = np.stack([fit_ability(own, self._answers(parent.key, task)) for parent in self.parents])
            seen = Seen(own, np.arange(first), self._answers(key, task, self._table.waves[:1]), parents)
            found[f"{task}/{_METRIC}"] = Estimate(self._estimate(seen))
        return found

    def _by_parents(self, key: str) -> dict[str, Estimate]:
        """Return the figures with the mean of the parents' as control variate."""
        table = self._table
        first, waves = table.waves[:1], table.waves
        parts, wholes = ([table.figures(parent.key, seen) for parent in self.parents] for seen in (first, waves))
        return {
            name: with_control(own, mean([each[name] for each in parts]), mean([each[name] for each in wholes]))
            for name, own in table.figures(key, first).items()
        }

    def _fit(self, whole: tuple[str, ...]) -> dict[str, Items]:
        if self._fitted[0] != whole:
            answers = {task: np.stack([self._answers(key, task) for key in whole]) for task in self._table.splits}
            self._fitted = (whole, {task: fit_items(each) for task, each in answers.items()})
        return self._fitted[1]

    def _answers(self, key: str, task: str, waves: Sequence[int] | None = None) -> Numbers:
        return self._table.columns(key, task, self._table.waves if waves is None else waves)[_COLUMN]

    def _order(self, task: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        split = self._table.splits[task]
        return np.array([item for wave in self._table.waves for item in split.items(wave)], np.int64)
