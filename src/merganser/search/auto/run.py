"""Make the best of some models for some tasks, within minutes, and show whether it is better than the best of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...engine.kernels.devices import resolve_devices
from ...engine.merge import merge, plan
from ...errors import MergeError, OutputError, TaskError
from ...evaluation.run import BATCH_TOKENS, Wanted
from ...evaluation.scoring.tasks import load_tasks
from ...files import write_whole
from ...version import __version__
from ...wording import default_names
from ..bench import Bench, Failed, Model, open_bench
from ..ends import Difference, End, best_single, difference, measure_ends, to_json
from ..folder import Folder, key_of, open_folder
from ..items import HELD, refuse_harness
from ..judge import ItemJudge, Verdict
from ..objectives import Objective, parse_objectives
from ..space import Space
from ..study import Study
from ..trials import Progress, Silent, Trial, Trials
from .portfolio import Candidate, around, candidates

MINUTES = 60.0

_SURE = 3.0
"""Standard errors by which a model must beat the base on a task: more than for an expert that is named, since the best of
several models is taken, and a share of a gain that is noise has no meaning."""

_PORTFOLIO = 0.6
_AROUND = 0.85
"""Shares of the time after which the portfolio, and the search around its best, begin nothing new."""


@dataclass(frozen=True)
class Tried:
    """A recipe that was tried.

    Args:
        name: Name of its recipe file.
        recipe: The recipe, as YAML.
        verdict: What it was worth; None if it failed.
        failed: Why it has no figure.
        seconds: How long it took.
    """

    name: str
    recipe: str
    verdict: Verdict | None
    failed: str | None
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether it was scored on all items of trials."""
        return self.verdict is not None and not self.verdict.stopped


@dataclass(frozen=True)
class Choice:
    """What was made of the models.

    Args:
        folder: The folder.
        objective: What was improved.
        domains: The best model of each task whose gain over the base counts.
        tried: The recipes of the portfolio.
        around: Trials around the best of them.
        ends: The winner, the models and the average, on items that nothing was chosen on.
        held_out: Number of these items.
        recommended: Name of what to use: "winner", a model, or "average".
        merged: Folder of the merge; None where it is not recommended.
        notes: What the user should know.
    """

    folder: Path
    objective: Objective
    domains: Mapping[str, str]
    tried: tuple[Tried, ...]
    around: tuple[Trial, ...]
    ends: tuple[End, ...]
    held_out: int
    recommended: str
    merged: Path | None
    notes: tuple[str, ...]

    @property
    def against(self) -> list[tuple[End, Difference]]:
        """The best single model and the average, each with how much better the winner is."""
        return _against(self.ends, self.objective)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data: format 1 of docs/search.md."""
        return {
            "kind": "auto result",
            "format": 1,
            "objective": self.objective.text,
            "domains": dict(self.domains),
            "tried": [
                {
                    "name": tried.name,
                    "value": None if tried.verdict is None else tried.verdict.values[0],
                    "items": 0 if tried.verdict is None else tried.verdict.items,
                    "stopped": tried.verdict is not None and tried.verdict.stopped,
                    "failed": tried.failed,
                    "seconds": tried.seconds,
                }
                for tried in self.tried
            ],
            "around": [
                {"name": t.name, "value": t.values and t.values[0], "items": t.items, "stopped": t.stopped}
                for t in self.around
            ],
            "held_out": self.held_out,
            "ends": to_json(self.ends, [self.objective]),
            "recommended": self.recommended,
            "merged": None if self.merged is None else str(self.merged),
            "notes": list(self.notes),
        }


def auto(
    base: str,
    experts: Sequence[str],
    out: str | Path,
    tasks: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    minutes: float = MINUTES,
    seed: int = 0,
    limit: int | None = None,
    context: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Make the best of some models for some tasks, without naming a method.

    A portfolio of methods is tried on one half of the items, then factors by depth around the best of them. On the other
    half, that nothing was chosen on, the winner is compared with the best of the models and with their average. If it is
    worse beyond the interval, that one is recommended, and nothing is merged.

    Args:
        base: The common ancestor.
        experts: Two or more models trained from it.
        out: Folder of the result; the same call continues one that was stopped.
        tasks: Texts, and questions or documents, as for `evaluate`.
        minutes: Time after which nothing new is tried; what is under way is finished.
        seed: Seed of the division of the items, and of the search.
        limit: Number of items of each task, both halves together.
        context: As for `evaluate`.
        dtype: As for `evaluate`.
        device: As for `evaluate`.
        batch_tokens: As for `evaluate`.
        cache_dir: Folder for models from the Hub.
        progress: Receives the progress.

    Raises:
        MergeError: Something is missing or wrong; the message says what.
    """
    progress = progress or Silent()
    if len(experts) < 2:
        raise TaskError(f"auto: merges two or more experts of one base, got {len(experts)}")
    if not minutes > 0:
        raise TaskError(f"minutes: must be above 0, got {minutes:g}")
    if not tasks:
        raise TaskError(
            "auto: tasks are missing (--tasks NAME=FILE...): texts (.txt), documents or questions (.jsonl) of what the "
            "merge should do; without them nothing says which merge is better"
        )
    begin = time.monotonic()
    loaded = load_tasks(tasks)
    refuse_harness(loaded)
    options = {"cache_dir": cache_dir} if cache_dir else {}
    listed = candidates(base, experts, adapters=all("+" in each for each in experts))
    plan(listed[0].recipe, keep_stages=False, **options)
    with open_folder(Path(out)) as folder:
        _check_merged(folder)
        wanted = Wanted(limit, context, None, dtype, batch_tokens, resolve_devices(device)[0])
        names = dict(zip(default_names([base, *experts]), [base, *experts], strict=True))
        bench, models = open_bench(names, loaded, wanted, folder.journal, seed, cache_dir)
        given: dict[str, Any] = {"command": "auto", "seed": seed, "version of merganser": __version__}
        given |= {"input": {name: model.key for name, model in models.items()}}
        given |= {"task": {task.name: task.hash for task in loaded}, "limit": limit, "context": context}
        given |= {"dtype": dtype, "device": str(wanted.device), "batch of tokens": batch_tokens}
        folder.check(given)
        folder.begin(given)
        search = _Search(base, experts, bench, folder, seed, progress, [*models.values()])
        search.try_all(listed, begin + 60 * minutes * _PORTFOLIO)
        search.try_around(begin + 60 * minutes * _AROUND)
        return search.prove()


class _Search:
    """The state of one call: what was tried so far."""

    def __init__(
        self,
        base: str,
        experts: Sequence[str],
        bench: Bench,
        folder: Folder,
        seed: int,
        progress: Progress,
        models: Sequence[Model],
    ) -> None:
        self.base, self.experts, self.seed = base, experts, seed
        self.bench, self.folder, self.progress, self.models = bench, folder, progress, models
        self.judge, self.domains = _judge(bench, models)
        for note in self.judge.notes:
            progress.note(note)
        self.tried: list[Tried] = []
        self.around: list[Trial] = []
        self.best: tuple[float, str, str] | None = None
        self.best_candidate: Candidate | None = None

    @property
    def objective(self) -> Objective:
        return self.judge.objectives[0]

    def try_all(self, listed: Sequence[Candidate], deadline: float) -> None:
        """Try the portfolio; the first candidate in any case."""
        for candidate in listed:
            if self.tried and time.monotonic() > deadline:
                left = len(listed) - len(self.tried)
                self.progress.note(
                    f"time for the portfolio is over; {left} of its {len(listed)} recipes were not tried"
                )
                break
            self._try(candidate, len(listed))
        if self.best is None:
            raise TaskError(f"auto: no recipe of the portfolio could be scored; the last: {self.tried[-1].failed}")

    def _try(self, candidate: Candidate, count: int) -> None:
        begin = time.monotonic()
        self.progress.begin(len(self.tried), count)
        best = None if self.best is None else self._model(*self.best[1:])
        verdict, failed = None, None
        try:
            verdict = self.judge.judge(self._model(candidate.name, candidate.recipe), best)
        except Failed as error:
            failed = str(error)
        seconds = round(time.monotonic() - begin, 3)
        tried = Tried(candidate.name, candidate.recipe, verdict, failed, seconds)
        self.tried.append(tried)
        if verdict is not None and tried.whole and (self.best is None or verdict.values[0] > self.best[0]):
            self.best = (verdict.values[0], candidate.name, candidate.recipe)
            self.best_candidate = candidate
        number, best_number = len(self.tried) - 1, self._number_of_best()
        shown = _shown(tried, number)
        self.progress.over(shown, shown if number == best_number else None)

    def _number_of_best(self) -> int:
        return next(i for i, t in enumerate(self.tried) if self.best is None or t.recipe == self.best[2])

    def try_around(self, deadline: float) -> None:
        """Search factors by depth around the best of the portfolio."""
        assert self.best_candidate is not None
        assert self.best is not None
        space = Space(around(self.best_candidate, self.base, self.experts))
        sampler = "gp" if len(space.dimensions) <= 12 else "cma"
        path = self.folder.path / f"trials-{self.best_candidate.name}.log"
        if not path.exists() and time.monotonic() > deadline:
            return
        self.progress.note(f"searching factors by depth around {self.best_candidate.name}")
        study = Study(path, space.dimensions, [self.objective.direction], sampler, self.seed, space.start())
        trials = Trials(study, space, self.judge, self.folder)
        trials.run(None, deadline, self.progress)
        self.around = trials.over
        found = trials.best
        if found is not None and found.values and found.values[0] > self.best[0]:
            self.best = (found.values[0], found.name, found.recipe)

    def prove(self) -> Choice:
        """Measure on the other half, and merge what is worth it."""
        assert self.best is not None
        winner = self._model(*self.best[1:])
        average = next(tried for tried in self.tried if tried.name == "linear")
        contenders = [(replace(winner, name="winner"), "winner"), *((model, "input") for model in self.models)]
        if average.recipe != self.best[2]:
            contenders.append((self._model("average", average.recipe), "average"))
        ends = measure_ends(contenders, self.judge, self.progress)
        recommended = _recommend(ends, self.objective)
        about = f"# found by merganser auto: {self.best[1]}\n"
        write_whole(self.folder.winner, about + self.best[2])
        merged = None
        if recommended == "winner":
            merged = self.folder.path / "merged"
            merge(self.folder.winner, merged, overwrite=True)
        choice = Choice(
            self.folder.path,
            self.objective,
            self.domains,
            tuple(self.tried),
            tuple(self.around),
            tuple(ends),
            self.bench.table.count([HELD]),
            recommended,
            merged,
            tuple(self.judge.notes),
        )
        write_whole(self.folder.result, json.dumps(choice.to_json(), indent=1, ensure_ascii=False) + "\n")
        return choice

    def _model(self, name: str, recipe: str) -> Model:
        return Model(key_of(recipe), name, self.folder.write_recipe(name, recipe))


def _judge(bench: Bench, models: Sequence[Model]) -> tuple[ItemJudge, dict[str, str]]:
    """Return a judge of what is recovered of the best model of each task, and the names of these models.

    Raises:
        TaskError: A model cannot be scored, or none beats the base on any task.
    """
    base, *experts = models
    waves = bench.table.waves
    best: dict[str, Model] = {}
    try:
        figures = {model.name: bench.score(model, waves) for model in models}
    except Failed as error:
        raise TaskError(str(error)) from error
    for task, split in bench.table.splits.items():
        sign = 1.0 if split.higher[split.main] else -1.0
        best[task] = max(experts, key=lambda m: sign * figures[m.name][f"{task}/{split.main}"].value)
    judge = ItemJudge(bench, base, best, stopping=True)
    try:
        judge.measure_references(_SURE)
    except TaskError:
        raise TaskError(
            "auto: on none of these tasks one of the models beats the base by three standard errors, so there is nothing "
            f"to keep; give more items, or tasks that the models were trained for. {'; '.join(judge.notes)}"
        ) from None
    judge.objectives = parse_objectives((), judge.known, judge.default)
    counted = {name.partition("/")[2] for name in judge.known if name.startswith("recovered/")}
    return judge, {task: model.name for task, model in best.items() if task in counted}


def _against(ends: Sequence[End], objective: Objective) -> list[tuple[End, Difference]]:
    winner = next(end for end in ends if end.role == "winner")
    others = [best_single(ends, objective), next((end for end in ends if end.role == "average"), None)]
    return [
        (end, difference(winner.values[0], end.values[0], objective))
        for end in others
        if end is not None and end.values and winner.values
    ]


def _recommend(ends: Sequence[End], objective: Objective) -> str:
    """Return the name of what to use: the winner, unless it is worse than another beyond the interval."""
    worse = [(gap.value, end.name) for end, gap in _against(ends, objective) if gap.interval and gap.interval[1] < 0]
    return min(worse)[1] if worse else "winner"


def _check_merged(folder: Folder) -> None:
    """Refuse a folder `merged` that is not ours, before anything is tried."""
    from ...engine.output.staging import check_target

    try:
        check_target(folder.path / "merged", overwrite=True)
    except MergeError as error:
        raise OutputError(str(error)) from error


def _shown(tried: Tried, number: int) -> Trial:
    """Return a recipe of the portfolio as a trial, for the progress."""
    verdict = tried.verdict
    return Trial(
        number,
        {},
        tried.recipe,
        None if verdict is None else verdict.values,
        () if verdict is None else tuple(e.stderr for e in verdict.estimates),
        True,
        0 if verdict is None else verdict.items,
        verdict is not None and verdict.stopped,
        None,
        tried.failed,
        tried.seconds,
        tried.name,
    )
