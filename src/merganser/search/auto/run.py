"""Make the best of some models for some tasks, within minutes, and show whether it is better than the best of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...engine.kernels.devices import resolve_devices
from ...engine.merge import merge, plan
from ...errors import MergeError, OutputError, TaskError
from ...evaluation.run import BATCH_TOKENS, Wanted
from ...evaluation.scoring.tasks import Task, load_tasks
from ...files import write_whole
from ...inference.stored import xxh3_of_file
from ...version import __version__
from ...wording import default_names
from ..bench import Bench, Failed, Model, open_bench
from ..ends import measure_ends
from ..folder import Folder, key_of, open_folder
from ..items import HELD, refuse_harness
from ..judge import ItemJudge
from ..objectives import Objective, parse_objectives
from ..space import Space
from ..study import Study
from ..trials import Progress, Silent, Trial, Trials
from .budget import Budget, keep_waves
from .choice import Choice, Tried, recommend
from .portfolio import Candidate, around, candidates
from .texts import halve, read_texts

MINUTES = 60.0

_SURE = 3.0
"""Standard errors by which a model must beat the base on a task: more than for an expert that is named, since the best of
several models is taken, and a share of a gain that is noise has no meaning."""


def auto(
    base: str,
    experts: Sequence[str],
    out: str | Path,
    tasks: Sequence[str | Path] | Mapping[str, str | Path] = (),
    *,
    data: Sequence[str | Path] | Mapping[str, str | Path] = (),
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
        tasks: Texts, and questions or documents, as for `evaluate`. Without them the second half of each file of `data` is
            a task.
        data: Text of the field of each expert, `NAME=FILE` or by name of the expert, which methods with data are calibrated
            on; without it none is tried.
        minutes: Time for everything. Where it is short, fewer items are scored, and recipes are left out; the first recipe,
            the proof and the merge take place in any case.
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
    names = dict(zip(default_names([base, *experts]), [base, *experts], strict=True))
    texts = read_texts(data, [*names][1:]) if data else {}
    if not tasks and not texts:
        raise TaskError(
            "auto: tasks are missing (--tasks NAME=FILE...): texts (.txt), documents or questions (.jsonl) of what the "
            "merge should do; or text of each expert's field, of which half is a task (--data NAME=FILE...); without "
            "them nothing says which merge is better"
        )
    begin = time.monotonic()
    loaded = load_tasks(tasks) if tasks else []
    refuse_harness(loaded)
    options = {"cache_dir": cache_dir} if cache_dir else {}
    plan(candidates(base, experts)[0].recipe, keep_stages=False, **options)
    with open_folder(Path(out)) as folder:
        _check_merged(folder)
        if texts and not tasks:
            texts, halves = halve(texts, folder.path / "texts")
            loaded = load_tasks(halves)
        _refuse_same(texts, loaded)
        wanted = Wanted(limit, context, None, dtype, batch_tokens, resolve_devices(device)[0])
        bench, found = open_bench(names, loaded, wanted, folder.journal, seed, cache_dir)
        models = [*found.values()]
        given: dict[str, Any] = {"command": "auto", "seed": seed, "version of merganser": __version__}
        given |= {"input": {name: model.key for name, model in found.items()}}
        given |= {"task": {task.name: task.hash for task in loaded}, "limit": limit, "context": context}
        given |= {"dtype": dtype, "device": str(wanted.device), "batch of tokens": batch_tokens}
        given |= {"data": {name: xxh3_of_file(path) for name, path in texts.items()}}
        waves = _waves(folder, given, bench, models, minutes, progress)
        bench.table.shorten(waves)
        search = _Search(base, experts, bench, folder, seed, progress, models, begin + 60 * minutes, options)
        search.try_all(candidates(base, experts, texts=[*texts.values()], kept=folder.path.absolute() / "statistics"))
        search.try_around()
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
        until: float,
        options: Mapping[str, Any],
    ) -> None:
        self.base, self.experts, self.seed = base, experts, seed
        self.bench, self.folder, self.progress, self.models = bench, folder, progress, models
        self.options = options
        begin = time.monotonic()
        self.judge, self.domains = _judge(bench, models)
        for note in self.judge.notes:
            progress.note(note)
        scored = len(models) * bench.table.count(bench.table.waves)
        # every model, the winner and the average are in the proof
        self.budget = Budget(bench, until, (time.monotonic() - begin) / scored, len(models) + 2, options)
        self.tried: list[Tried] = []
        self.around: list[Trial] = []
        self.best: tuple[float, str, str] | None = None
        self.best_candidate: Candidate | None = None
        self.best_seconds = 0.0

    @property
    def objective(self) -> Objective:
        return self.judge.objectives[0]

    def try_all(self, listed: Sequence[Candidate]) -> None:
        """Try the portfolio: the first candidate in any case, and those that fit into the time."""
        left: list[str] = []
        for candidate in listed:
            if self.tried and not self.budget.fits(candidate.recipe):
                left.append(candidate.name)
            else:
                self._try(candidate, len(listed))
        if left:
            self.progress.note(f"not tried, for lack of time: {', '.join(left)}; more --minutes try them")
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
            self.best_candidate, self.best_seconds = candidate, seconds
        number, best_number = len(self.tried) - 1, self._number_of_best()
        shown = _shown(tried, number)
        self.progress.over(shown, shown if number == best_number else None)

    def _number_of_best(self) -> int:
        return next(i for i, t in enumerate(self.tried) if self.best is None or t.recipe == self.best[2])

    def try_around(self) -> None:
        """Search factors by depth around the best of the portfolio."""
        assert self.best_candidate is not None
        assert self.best is not None
        space = Space(around(self.best_candidate))
        deadline = self.budget.last_trial(self.best_seconds)
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
        recommended = recommend(ends, self.objective)
        about = f"# found by merganser auto: {self.best[1]}\n"
        write_whole(self.folder.winner, about + self.best[2])
        merged = None
        if recommended == "winner":
            merged = self.folder.path / "merged"
            merge(self.folder.winner, merged, overwrite=True, **self.options)
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


def _waves(
    folder: Folder,
    given: dict[str, Any],
    bench: Bench,
    models: Sequence[Model],
    minutes: float,
    progress: Progress,
) -> int:
    """Return how many waves of items are scored, as at the first call of the folder, which is begun with it."""
    known = folder.settings() or {}
    waves, note = known.get("waves of items"), None
    folder.check({**given, "waves of items": waves} if known else given)
    if waves is None:
        try:
            waves, note = keep_waves(bench, models, minutes)
        except Failed as error:
            raise TaskError(str(error)) from error
    folder.begin({**given, "waves of items": waves})
    of = len(bench.table.waves)
    if waves < of:
        progress.note(
            f"{'a quarter' if waves == 1 else 'half'} of the items is scored, since all would take more than half of the "
            "minutes; with more minutes, and another folder, all are"
        )
    if note:
        progress.note(note)
    return int(waves)


def _refuse_same(texts: Mapping[str, Path], tasks: Sequence[Task]) -> None:
    """Refuse a text that is both calibrated on and scored.

    Raises:
        TaskError: There is one.
    """
    sources = {Path(task.source).expanduser().absolute(): task.name for task in tasks}
    for name, path in texts.items():
        if path in sources:
            raise TaskError(
                f"data: {path} is the text of {name} and the task {sources[path]}; a merge that was calibrated on what it "
                "is scored on proves nothing: give other texts, or leave the tasks out, so that it is divided"
            )


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
