"""Carry out trials of a study in this process: ask for a point, merge, score, and report the score."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import TaskError
from .folder import Folder, key_of
from .samplers.own import SCORES
from .scoring.bench import Failed, Model
from .scoring.judge import Judge
from .scoring.objectives import Objective
from .space.space import Space
from .study import Asked, Study, Told

_HOPELESS_START = 5
"""Trials that may fail at the beginning; if none of them has a figure, none of the next will have one."""
_POLL = 0.2
"""Seconds between two looks at what other processes do."""


@dataclass(frozen=True)
class Trial:
    """A trial that is over.

    Args:
        number: Its number, from 0.
        settings: The values that were tried, by where they stand in the recipe.
        recipe: The plain recipe.
        values: The objectives; None if it failed.
        stderr: Standard error of each objective, None if it has none.
        feasible: Whether it keeps all bounds.
        items: Number of items that it was scored on.
        stopped: Whether it was ended early.
        same_as: Number of an earlier trial with the same recipe, which was not scored again.
        failed: Why it has no values; None if it has.
        seconds: How long it took.
        label: Name of its recipe file where it is not a numbered one.
    """

    number: int
    settings: Mapping[str, Any]
    recipe: str
    values: tuple[float, ...] | None
    stderr: tuple[float | None, ...]
    feasible: bool
    items: int
    stopped: bool
    same_as: int | None
    failed: str | None
    seconds: float
    label: str | None = None

    @property
    def name(self) -> str:
        """Name of its recipe file."""
        return self.label or _name(self.number)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, with the name of its recipe file in place of the recipe."""
        own = {key: value for key, value in vars(self).items() if key not in ("recipe", "label")}
        return own | {"recipe": self.name}

    @property
    def model(self) -> Model:
        """Key and name of the model; the reference is empty until the recipe is written."""
        return Model(key_of(self.recipe), self.name, "")

    @property
    def whole(self) -> bool:
        """Whether it may win: it was scored on all items of trials and keeps the bounds."""
        return self.values is not None and not self.stopped and self.feasible


class Progress(Protocol):
    """Receives the progress of a search."""

    def begin(self, trial: int, of: int | None) -> None:
        """Called before trial number `trial` (from 0) of `of`, which is None where only time limits them."""

    def over(self, trial: Trial, best: Trial | None) -> None:
        """Called when a trial is over; `best` is the best with one objective, else None."""

    def note(self, text: str) -> None:
        """Called with what the user should know."""

    def measuring(self, model: str) -> None:
        """Called before a model that others are compared with is scored on the items of trials."""

    def testing(self, model: str) -> None:
        """Called before a model is scored on the items held out."""


class Silent:
    """A `Progress` that shows nothing."""

    def begin(self, trial: int, of: int | None) -> None:
        """Do nothing."""

    def over(self, trial: Trial, best: Trial | None) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def measuring(self, model: str) -> None:
        """Do nothing."""

    def testing(self, model: str) -> None:
        """Do nothing."""


class Trials:
    """The trials of a study.

    Args:
        study: Asks and is told.
        space: Makes recipes.
        judge: Scores them.
        folder: Where they are written.
        around: What they are trials of, where a folder has several studies: their names begin with it.
    """

    def __init__(self, study: Study, space: Space, judge: Judge, folder: Folder, around: str | None = None) -> None:
        self._study, self._space, self._judge, self._folder = study, space, judge, folder
        self._around = around
        self._known: dict[int, Trial] = {}
        self.refresh()

    @property
    def over(self) -> list[Trial]:
        """The trials that are over, those of other processes included, by number."""
        return [self._known[number] for number in sorted(self._known)]

    @property
    def objectives(self) -> Sequence[Objective]:
        """What they improve."""
        return self._judge.objectives

    @property
    def importance(self) -> dict[str, dict[str, float]]:
        """For each objective, which share of its variation each value explains, as far as it is known."""
        found = {o.text: self._study.importance(i) for i, o in enumerate(self.objectives)}
        return {name: shares for name, shares in found.items() if shares}

    def refresh(self) -> list[Trial]:
        """Take over what other processes did since the last call, and return the trials that are new."""
        new = [self._trial(told) for told in self._study.told if told.number not in self._known]
        self._known |= {trial.number: trial for trial in new}
        # after the trials, so that the items of each are known
        self._folder.journal.refresh()
        return new

    def run(self, count: int | None, deadline: float | None, progress: Progress) -> None:
        """Carry out trials until there are `count`, or until the deadline; then wait for those of other processes.

        Args:
            count: Number of trials, those of earlier runs included; None for no limit.
            deadline: On `time.monotonic()`; None for none. The trials that run then are finished.
            progress: Receives the progress.

        Raises:
            TaskError: The first trials all failed.
        """
        waits = False
        while not self.enough(count, deadline):
            asked = self._study.ask(count, self._space.resolve)
            if asked is None:
                if not waits:
                    progress.note("waiting for the trials of other processes")
                waits = True
                self._wait()
                continue
            progress.begin(asked.number, count)
            self.refresh()
            self._carry_out(asked)
            self.refresh()
            progress.over(self._known[asked.number], self.best if len(self._judge.objectives) == 1 else None)
            self.check_start()
        while self._study.busy:
            self._wait()

    def enough(self, count: int | None, deadline: float | None) -> bool:
        """Return whether no further trial is to begin; for the arguments see `run`."""
        if count is not None and len(self._known) >= count:
            return True
        return deadline is not None and time.monotonic() >= deadline

    def check_start(self) -> None:
        """Refuse to go on if all of the first trials failed.

        Raises:
            TaskError: They did.
        """
        over = self.over
        if len(over) >= _HOPELESS_START and all(trial.values is None for trial in over):
            raise TaskError(
                f"the first {_HOPELESS_START} trials failed, so the search ends; the last: {over[-1].failed}"
            )

    def _wait(self) -> None:
        time.sleep(_POLL)
        self.refresh()

    @property
    def best(self) -> Trial | None:
        """The best trial by the first objective, of those that were scored on everything and keep the bounds."""
        sign = self._judge.objectives[0].sign
        whole = [(sign * trial.values[0], -trial.number, trial) for trial in self.over if trial.whole and trial.values]
        return max(whole, key=lambda each: each[:2])[2] if whole else None

    @property
    def front(self) -> list[Trial]:
        """The trials that no other one is better than in one objective and at least as good as in all others."""
        signs = [objective.sign for objective in self._judge.objectives]
        points = {
            trial.number: tuple(sign * value for sign, value in zip(signs, trial.values or (), strict=True))
            for trial in self.over
            if trial.whole and trial.same_as is None
        }
        return [
            trial
            for trial in self.over
            if trial.number in points and not any(_beats(other, points[trial.number]) for other in points.values())
        ]

    def written(self, trial: Trial) -> Model:
        """Return the model of a trial, with its recipe written."""
        return Model(key_of(trial.recipe), trial.name, self._folder.write_recipe(trial.name, trial.recipe))

    def _label(self, number: int) -> str | None:
        return None if self._around is None else f"{self._around}-{_name(number)}"

    def _carry_out(self, asked: Asked) -> None:
        begin = time.monotonic()
        recipe = self._space.resolve(asked.point)
        about: dict[str, Any] = {}
        excess: Mapping[str, float] = {}
        values: Sequence[float] | None = None
        same = next((trial for trial in self.over if trial.recipe == recipe), None)
        if same is not None:
            about = {"same_as": same.number if same.same_as is None else same.same_as, "failed": same.failed}
            about |= {"stderr": list(same.stderr), "stopped": same.stopped}
            values, excess = same.values, {} if same.feasible else {"same": 1.0}
        else:
            name = self._label(asked.number) or _name(asked.number)
            model = Model(key_of(recipe), name, self._folder.write_recipe(name, recipe))
            best = self.best
            # a trial that was stopped is finished: what it took before counts
            begin -= self._judge.spent(model)
            try:
                verdict = self._judge.judge(model, None if best is None else self.written(best))
            except Failed as error:
                about = {"failed": str(error)}
            else:
                values, excess = verdict.values, verdict.excess
                about = {"items": verdict.items, "stopped": verdict.stopped}
                about["stderr"] = [e.stderr if e.parts else None for e in verdict.estimates]
                if self._study.keeps_scores and not verdict.stopped:
                    about[SCORES] = self._judge.scores(model)
        self._study.tell(asked, values, about | {"seconds": round(time.monotonic() - begin, 3)}, excess)

    def _trial(self, told: Told) -> Trial:
        about = told.about
        return Trial(
            number=told.number,
            settings=self._space.describe(told.point),
            recipe=self._space.resolve(told.point),
            values=told.values,
            stderr=tuple(about.get("stderr") or ()),
            feasible=told.feasible,
            items=about.get("items", 0),
            stopped=about.get("stopped", False),
            same_as=about.get("same_as"),
            failed=about.get("failed"),
            seconds=about.get("seconds", 0.0),
            label=self._label(told.number),
        )


def _name(number: int) -> str:
    return f"trial-{number + 1:04d}"


def _beats(point: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return point != other and all(a >= b for a, b in zip(point, other, strict=True))
