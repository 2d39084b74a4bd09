"""Score trials: their figures, wave by wave, and the test that ends a significantly worse one early."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ...engine.merge import merge
from ...errors import MergeError, TaskError
from ...evaluation.retention import SURE
from ...evaluation.scoring.estimate import Estimate
from ...wording import digits_text
from ..estimators.control_variate import with_control
from ..folder import Folder
from .bench import Bench, Failed, Model
from .command import run_command
from .estimated import Estimated
from .items import HELD
from .objectives import Bound, Figures, Objective, names_of_retained, retained

_HOPELESS = 0.03
"""Level of the test that ends a trial. It is made twice, and this is Pocock's level of two tests for 5 % in all."""

_COMMAND = "command"
"""What stands for a task in the table of items where a command judges."""

_LEAST = 6
"""Fewest items that a trial is ended on."""


@dataclass(frozen=True)
class Verdict:
    """The score of a trial.

    Args:
        values: The objectives, as the sampler is told.
        estimates: The objectives on the items that it was scored on.
        excess: By how much it misses each bound.
        items: Number of items that it was scored on.
        stopped: Whether it was ended early; then the values are estimates of what they would be on all items.
    """

    values: tuple[float, ...]
    estimates: tuple[Estimate, ...]
    excess: Mapping[str, float] = field(default_factory=dict)
    items: int = 0
    stopped: bool = False


class Judge(Protocol):
    """Scores trials."""

    objectives: Sequence[Objective]
    bounds: Sequence[Bound]

    def judge(self, model: Model, best: Model | None) -> Verdict:
        """Return the score of a model.

        Args:
            model: A trial.
            best: The best trial so far, which was judged on everything; None to judge this one on everything, too.

        Raises:
            Failed: It has no figures.
        """

    def final(self, model: Model) -> list[Estimate]:
        """Return the objectives of a model on what no trial saw.

        Raises:
            Failed: It has no figures.
        """

    def scores(self, model: Model) -> list[float] | None:
        """Return the score of a judged model on each item, at least 0, where higher is better; None without items."""

    def spent(self, model: Model) -> float:
        """Return the seconds that were spent on a model already, in processes that were stopped, too."""


class ItemJudge:
    """Judges by the items of tasks.

    Args:
        bench: Scores the models.
        base: The base, where retention is measured.
        experts: The expert of each task that has one.
        stopping: Whether significantly worse trials are ended early; only with one objective.
        estimated: Says, instead of a test, which trials are not better than the best one; None for the test.
    """

    def __init__(
        self,
        bench: Bench,
        base: Model | None,
        experts: Mapping[str, Model],
        *,
        stopping: bool,
        estimated: Estimated | None = None,
    ) -> None:
        self._bench = bench
        self._base = base
        self._experts = dict(experts)
        self._stopping = stopping
        self.estimated = estimated
        self.objectives: Sequence[Objective] = ()
        self.bounds: Sequence[Bound] = ()
        self.notes: list[str] = []
        self._mains = {name: (split.main, split.higher[split.main]) for name, split in bench.table.splits.items()}

    @property
    def known(self) -> dict[str, bool]:
        """Whether higher is better, by name of every figure."""
        found = {
            f"{task}/{metric}": higher
            for task, split in self._bench.table.splits.items()
            for metric, higher in split.higher.items()
        }
        return found | (names_of_retained(self._experts, self._mains) if self._base else {})

    @property
    def default(self) -> str | None:
        """The objective if none is given; None if there is no natural one."""
        if self._experts:
            return "recovered/mean"
        metrics = {metric for metric, _ in self._mains.values()}
        if len(metrics) > 1:
            return None
        share = "" if len(self._mains) == 1 else f"{1 / len(self._mains):.6g}*"
        return "+".join(f"{share}{task}/{metric}" for task, (metric, _) in self._mains.items())

    def measure_references(self, sure: float = SURE, tell: Callable[[str], None] = lambda _: None) -> None:
        """Score base and experts, and leave out experts whose gain over the base is noise.

        Args:
            sure: Standard errors by which an expert must beat the base.
            tell: Called with the name of each model that is scored now.

        Raises:
            TaskError: They cannot be scored, or no expert is left.
        """
        waves = self._bench.table.waves
        try:
            references = [*(self.estimated.parents if self.estimated else ()), *([self._base] if self._base else ())]
            distinct = {each.key: each for each in [*references, *self._experts.values()]}
            self._bench.score_all(distinct.values(), waves, tell)
        except Failed as error:
            raise TaskError(str(error)) from error
        if self._base is None:
            return
        try:
            origin = self._bench.score(self._base, waves)
            found = {task: self._bench.score(model, waves) for task, model in self._experts.items()}
        except Failed as error:
            raise TaskError(str(error)) from error
        for task, figures in found.items():
            metric, higher = self._mains[task]
            gain = (figures[f"{task}/{metric}"] - origin[f"{task}/{metric}"]) * (1.0 if higher else -1.0)
            if gain.value <= sure * (gain.stderr or 0.0) or gain.value <= 0:
                name = self._experts.pop(task).name
                width = "" if gain.stderr is None else f" ± {digits_text(gain.stderr)}"
                self.notes.append(
                    f"{task} does not count as a domain: {name} does not beat the base by {sure:g} standard errors: "
                    f"{digits_text(gain.value, 3)}{width} {metric}"
                )
        if found and not self._experts:
            raise TaskError("experts: none beats the base on its task, so what a merge keeps of them has no meaning")

    def figures(self, model: Model, waves: Sequence[int]) -> Figures:
        """Return all figures of a model over some waves.

        Raises:
            Failed: It has none.
        """
        return self._with_retained(self._bench.score(model, waves), waves)

    def _with_retained(self, own: Figures, waves: Sequence[int]) -> Figures:
        if self._base is None:
            return own
        origin = self._bench.score(self._base, waves)
        experts = {task: self._bench.score(expert, waves) for task, expert in self._experts.items()}
        return {**own, **retained(own, origin, experts, self._mains)}

    def judge(self, model: Model, best: Model | None) -> Verdict:
        """Return the score of a model: as `Judge.judge`."""
        if self.estimated is not None and best is not None:
            verdict = self._by_estimate(self.estimated, model, best)
            if verdict is not None:
                return verdict
        table = self._bench.table
        waves = table.waves
        for seen in range(1, len(waves)):
            # with several objectives, a model that is worse in the first may be the best in another
            if best is None or not self._stopping or self.estimated is not None or len(self.objectives) > 1:
                break
            objective = self.objectives[0]
            part = waves[:seen]
            own, other = (objective.value(self.figures(each, part)) for each in (model, best))
            if hopeless((own - other) * objective.sign, table.count(part)):
                whole = objective.value(self.figures(best, waves))
                told = _no_better(with_control(own, other, whole), whole, objective)
                return Verdict((told.value,), (told,), self._excess(self.figures(model, part)), table.count(part), True)
        figures = self.figures(model, waves)
        estimates = tuple(objective.value(figures) for objective in self.objectives)
        return Verdict(tuple(e.value for e in estimates), estimates, self._excess(figures), table.count(waves))

    def _by_estimate(self, estimated: Estimated, model: Model, best: Model) -> Verdict | None:
        """Return the estimated score of a model after the first wave; None if it must be scored on everything."""
        table, objective = self._bench.table, self.objectives[0]
        seen = table.waves[:1]
        self._bench.score(model, seen)
        found = estimated.figures(model.key)
        if found is None:
            return None
        figures = self._with_retained(found, table.waves)
        told = objective.value(figures)
        if objective.sign * (told.value - objective.value(self.figures(best, table.waves)).value) > 0:
            return None
        return Verdict((told.value,), (told,), self._excess(figures), table.count(seen), True)

    def final(self, model: Model) -> list[Estimate]:
        """Return the objectives of a model on the items held out."""
        figures = self.figures(model, [HELD])
        return [objective.value(figures) for objective in self.objectives]

    def scores(self, model: Model) -> list[float] | None:
        """Return the score of a model on each item of trials: 1 for a right answer, of texts the probability of a byte."""
        table, found = self._bench.table, list[float]()
        for task, split in table.splits.items():
            found += split.scores(table.columns(model.key, task, table.waves))
        return found

    def spent(self, model: Model) -> float:
        """Return how long it took so far to make and score a model."""
        return self._bench.table.seconds([model.key])

    def _excess(self, figures: Figures) -> dict[str, float]:
        return {str(bound): bound.excess(figures) for bound in self.bounds}


def _no_better(told: Estimate, best: Estimate, objective: Objective) -> Estimate:
    """Return an estimate of a hopeless model, at most as good as the best one, which it was found to be worse than."""
    if objective.sign * (told.value - best.value) <= 0:
        return told
    return Estimate(best.value, told.parts)


def hopeless(difference: Estimate, items: int) -> bool:
    """Return whether a model is significantly worse than another.

    Args:
        difference: Its objective minus the other's, on the same items, where higher is better.
        items: Number of items.
    """
    from scipy.stats import t

    error = difference.stderr
    if error is None or error <= 0 or items < _LEAST:
        return False
    return bool(t.cdf(difference.value / error, items - 1) < _HOPELESS)


class CommandJudge:
    """Judges by what an external command prints; each model is merged into a folder that exists while it runs.

    Args:
        words: The command.
        timeout: Seconds after which it is ended.
        folder: Where models are merged, and figures are kept.
        objectives: What it prints.
        bounds: Limits on what it prints.
    """

    def __init__(
        self,
        words: list[str],
        timeout: float,
        folder: Folder,
        objectives: Sequence[Objective],
        bounds: Sequence[Bound],
    ) -> None:
        self._words, self._timeout, self._folder = words, timeout, folder
        self.objectives = objectives
        self.bounds = bounds
        folder.scratch.mkdir(parents=True, exist_ok=True)

    def judge(self, model: Model, best: Model | None) -> Verdict:
        """Return the score of a model: as `Judge.judge`."""
        figures = self._figures(model)
        estimates = tuple(objective.value(figures) for objective in self.objectives)
        excess = {str(bound): bound.excess(figures) for bound in self.bounds}
        return Verdict(tuple(e.value for e in estimates), estimates, excess)

    def final(self, model: Model) -> list[Estimate]:
        """Return the objectives of a model; the command decides on which items."""
        figures = self._figures(model)
        return [objective.value(figures) for objective in self.objectives]

    def scores(self, model: Model) -> list[float] | None:
        """Return None: the items are the command's own."""
        return None

    def spent(self, model: Model) -> float:
        """Return 0: a command that was ended gave nothing, and is run again."""
        return 0.0

    def _figures(self, model: Model) -> Figures:
        # a recipe with its inputs is what the key says; a folder may have changed since
        key = f"{model.key}/{_COMMAND}"
        known = self._folder.journal.get(key, 0) if model.key.startswith("recipe ") else None
        if known is None:
            known = {"figures": {name: figure.value for name, figure in self._run(model).items()}}
            self._folder.journal.add(key, 0, known, model=model.name)
        return {name: Estimate(value) for name, value in known["figures"].items()}

    def _run(self, model: Model) -> Figures:
        wanted = {name: None for objective in self.objectives for _, name in objective.terms}
        wanted |= {bound.name: None for bound in self.bounds}
        path = Path(str(model.reference))
        if path.suffix != ".yaml":
            return run_command(self._words, path, self._timeout, wanted)
        with tempfile.TemporaryDirectory(prefix="trial-", dir=self._folder.scratch) as scratch:
            try:
                made = merge(path, Path(scratch, "model"))
            except MergeError as error:
                raise Failed(str(error)) from error
            return run_command(self._words, made.out, self._timeout, wanted)
