"""Find the best merge of some models for some tasks, within a given time, and test whether it beats the best of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...engine.kernels.devices import resolve_devices
from ...engine.merge import merge, plan
from ...errors import TaskError
from ...evaluation.run import BATCH_TOKENS, Wanted
from ...evaluation.scoring.harness_arguments import parse_arguments
from ...evaluation.scoring.tasks import load_tasks
from ...files import write_whole
from ...inference.stored import xxh3_of_file
from ...version import __version__
from ...wording import default_names
from ..ends import measure_ends
from ..folder import Folder, key_of, open_folder
from ..scoring.bench import Bench, Failed, Model, open_bench
from ..scoring.items import HELD
from ..scoring.objectives import Objective
from ..space.space import Space
from ..study import Study
from ..trials import Progress, Silent, Trial, Trials
from .begin import (
    check_experts,
    check_merged,
    notes_of_same,
    notes_of_useless,
    open_judge,
    refuse_same,
    remove_merged,
    settle_waves,
)
from .budget import Budget
from .choice import Choice, read_choice
from .outcome import Above, Tried, plain, recommend
from .portfolio import Candidate, around, candidates, plain_around
from .texts import halve, read_texts

MINUTES = 60.0

_NARROW = 12
"""Numbers up to which a Gaussian process searches around the best."""

_JUDGED = "judged "
"""What the note of a recipe that was judged begins with, before its key: how long that took."""


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
    lm_eval: Mapping[str, Any] | Sequence[str] = (),
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Find the best merge of some models for some tasks, without naming a method.

    A portfolio of methods is tried on one half of the items, then factors by depth around the best of them. On the other
    half, that nothing was chosen on, the winner is compared with the best of the models and with their average. If it is
    worse beyond the interval, that one is recommended, and nothing is merged.

    Args:
        base: The common ancestor.
        experts: Two or more models trained from it.
        out: Folder of the result; the same call continues one that was stopped.
        tasks: Texts, questions or documents, and tasks of lm-eval, as for `evaluate`. Without them the second half of each
            file of `data` is a task.
        data: Text of the field of each expert, `NAME=FILE` or by name of the expert, which methods with data are calibrated
            on; without it none is tried.
        minutes: Time for everything. Where it is short, fewer items are scored, and recipes are left out; the first recipe,
            the held-out test and the merge take place in any case. A call that continues another one has the whole time again.
        seed: Seed of the division of the items, and of the search.
        limit: Number of items of each task, both halves together.
        context: As for `evaluate`.
        dtype: As for `evaluate`.
        device: As for `evaluate`.
        batch_tokens: As for `evaluate`.
        lm_eval: As for `evaluate`.
        cache_dir: Folder for models from the Hub.
        progress: Receives the progress.

    Raises:
        MergeError: Something is missing or wrong; the message says what.
    """
    progress = progress or Silent()
    if not minutes > 0:
        raise TaskError(f"minutes: must be above 0, got {minutes:g}")
    check_experts(base, experts, str(out))
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
    options = {"cache_dir": cache_dir} if cache_dir else {}
    plan(candidates(base, experts)[0].recipe, keep_stages=False, **options)
    with open_folder(Path(out)) as folder:
        check_merged(folder)
        if texts and not tasks:
            texts, halves = halve(texts, folder.path / "texts")
            loaded = load_tasks(halves)
        refuse_same(texts, loaded)
        wanted = Wanted(
            limit=limit,
            context=context,
            stride=None,
            dtype=dtype,
            batch_tokens=batch_tokens,
            device=resolve_devices(device)[0],
            harness=parse_arguments(lm_eval),
        )
        bench, found = open_bench(names, loaded, wanted, folder.journal, seed, cache_dir)
        models = [*found.values()]
        notes = notes_of_same(models)
        waves = settle_waves(folder, _settings(wanted, seed, found, bench, texts), bench, models, minutes, progress)
        bench.table.shorten(waves)
        search = _Search(base, experts, bench, folder, seed, progress, models, begin + 60 * minutes, options, notes)
        try:
            search.try_all(
                candidates(base, experts, texts=[*texts.values()], kept=folder.path.absolute() / "statistics")
            )
            search.try_around()
            return search.test_and_merge()
        except KeyboardInterrupt:
            raise Interrupted(search.best_so_far()) from None


def _settings(
    wanted: Wanted, seed: int, models: Mapping[str, Model], bench: Bench, texts: Mapping[str, Path]
) -> dict[str, Any]:
    """Return what a call that continues must have in common with the first one."""
    harness = {"lm-eval": wanted.harness.to_json()} if wanted.harness else {}
    return {
        "command": "auto",
        "seed": seed,
        "version of merganser": __version__,
        "input": {name: model.key for name, model in models.items()},
        "task": {name: split.hash for name, split in bench.table.splits.items()},
        "limit": wanted.limit,
        "context": wanted.context,
        **harness,
        "dtype": wanted.dtype,
        "device": str(wanted.device),
        "batch of tokens": wanted.batch_tokens,
        "data": {name: xxh3_of_file(path) for name, path in texts.items()},
    }


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed; the same call continues.

    Args:
        best: What was the best so far, in words; None if nothing was scored yet.
    """

    def __init__(self, best: str | None) -> None:
        super().__init__()
        self.best = best


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
        notes: Sequence[str],
    ) -> None:
        self.base, self.experts, self.seed = base, experts, seed
        self.bench, self.folder, self.progress, self.models = bench, folder, progress, models
        self.options = options
        self.judge, self.domains = open_judge(bench, models, progress)
        self.notes = [*notes, *self.judge.notes, *notes_of_useless(models, self.domains)]
        for note in self.notes:
            progress.note(note)
        pace = bench.table.pace([model.key for model in models])
        # every model, the winner and the average are in the held-out test
        self.budget = Budget(bench, until, pace, len(models) + 2, options)
        self._listed: tuple[Candidate, ...] = ()
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
        self._listed = tuple(listed)
        left: list[str] = []
        for candidate in listed:
            known = self._seconds_of(candidate) is not None
            if self.tried and not known and not self.budget.fits(candidate.recipe):
                left.append(candidate.name)
            else:
                self._try(candidate, len(listed))
        if left:
            self.notes.append(f"not tried, for lack of time: {', '.join(left)}; more --minutes try them")
            self.progress.note(self.notes[-1])
        if self.best is None:
            raise TaskError(f"auto: no recipe of the portfolio could be scored; the last: {self.tried[-1].failed}")

    def _try(self, candidate: Candidate, count: int) -> None:
        key = key_of(candidate.recipe)
        # what a call that was stopped spent on it counts
        begin = time.monotonic() - self.bench.table.seconds([key])
        self.progress.begin(len(self.tried), count)
        best = None if self.best is None else self._model(*self.best[1:])
        verdict, failed = None, None
        try:
            verdict = self.judge.judge(self._model(candidate.name, candidate.recipe), best)
        except Failed as error:
            failed = str(error)
        seconds = self._seconds_of(candidate)
        if seconds is None:
            seconds = round(time.monotonic() - begin, 3)
            if verdict is not None:
                self.folder.journal.note(_JUDGED + key, seconds)
        figures = (
            {}
            if verdict is None
            else self.judge.figures(self._model(candidate.name, candidate.recipe), self._seen(key))
        )
        tried = Tried(candidate.name, candidate.recipe, verdict, failed, seconds, figures)
        self.tried.append(tried)
        if verdict is not None and tried.whole and (self.best is None or verdict.values[0] > self.best[0]):
            self.best = (verdict.values[0], candidate.name, candidate.recipe)
            self.best_candidate, self.best_seconds = candidate, seconds
        number, best_number = len(self.tried) - 1, self._number_of_best()
        shown = _shown(tried, number)
        self.progress.over(shown, shown if number == best_number else None)

    def _seconds_of(self, candidate: Candidate) -> float | None:
        """Return how long a candidate took in an earlier call; None if it was not judged in one."""
        return self.folder.journal.notes.get(_JUDGED + key_of(candidate.recipe))

    def _seen(self, key: str) -> list[int]:
        """Return the waves that a model was scored on."""
        return [wave for wave in self.bench.table.waves if not self.bench.table.missing(key, wave)]

    def _number_of_best(self) -> int:
        return next(i for i, t in enumerate(self.tried) if self.best is None or t.recipe == self.best[2])

    def try_around(self) -> None:
        """Search factors by depth around the best of the portfolio."""
        assert self.best_candidate is not None
        assert self.best is not None
        deadline = self.budget.last_trial(self.best_seconds, self.budget.merging(plain_around(self.best_candidate)))
        if not self._journal_of(self.best_candidate).exists() and time.monotonic() > deadline:
            self._recall()
            return
        self.progress.note(f"searching factors by depth around {self.best_candidate.name}")
        trials = self._around(self.best_candidate)
        try:
            trials.run(None, deadline, Above(self.progress, self.best[0]))
        except TaskError as error:
            # what the portfolio found is worth its test all the same
            self.notes.append(f"around {self.best_candidate.name}: {error}")
            self.progress.note(self.notes[-1])
        self.around = trials.over
        self.best = self._better(trials.best)
        self._recall()

    def _recall(self) -> None:
        """Take the best of what earlier calls found around other recipes, if it is better."""
        for candidate in self._listed:
            path = self._journal_of(candidate)
            if candidate is self.best_candidate or not path.exists():
                continue
            self.best = self._better(self._around(candidate).best)

    def _better(self, trial: Trial | None) -> tuple[float, str, str] | None:
        """Return the best so far: what it is now, or a trial that is better."""
        if trial is None or not trial.values or self.best is None or trial.values[0] <= self.best[0]:
            return self.best
        return trial.values[0], trial.name, trial.recipe

    def _journal_of(self, candidate: Candidate) -> Path:
        return self.folder.path / f"trials-{candidate.name}.log"

    def _around(self, candidate: Candidate) -> Trials:
        """Return the search around a candidate, with the trials that were made already."""
        recipe, value = around(candidate)
        space = Space(recipe)
        sampler = "gp" if len(space.dimensions) <= _NARROW else "cma"
        # begins at the candidate itself, and not at equal shares as other searches do
        start = dict.fromkeys((dimension.name for dimension in space.dimensions), value)
        study = Study(
            self._journal_of(candidate), space.dimensions, [self.objective.direction], sampler, self.seed, start
        )
        return Trials(study, space, self.judge, self.folder, candidate.name)

    def best_so_far(self) -> str | None:
        """Return what is the best until now, in words; None if nothing was scored on all items yet."""
        if self.best is None:
            return None
        candidate = self.best_candidate
        known = candidate is not None and self._journal_of(candidate).exists()
        best = self._better(self._around(candidate).best if candidate is not None and known else None)
        assert best is not None
        return f"{best[1]}, which keeps {best[0]:.4f} on the items of trials: {self.folder.path / 'recipes' / best[1]}.yaml"

    def test_and_merge(self) -> Choice:
        """Test the best on the items held out, and merge it if it is recommended."""
        assert self.best is not None
        winner = self._model(*self.best[1:])
        average = next(tried for tried in self.tried if tried.name == "linear")
        contenders = [(replace(winner, name="winner"), "winner"), *((model, "input") for model in self.models)]
        if average.recipe != self.best[2]:
            contenders.append((self._model("average", average.recipe), "average"))
        ends = measure_ends(contenders, self.judge, self.progress)
        measured = {end.name for end in ends if end.values}
        kept = {model.name: self.judge.figures(model, [HELD]) for model, _ in contenders if model.name in measured}
        recommended = recommend(ends, self.objective)
        about = f"# found by merganser auto: {self.best[1]}\n"
        write_whole(self.folder.winner, about + self.best[2])
        merged = None
        if recommended == "winner":
            merged = self.folder.path / "merged"
            merge(self.folder.winner, merged, overwrite=True, **self.options)
        elif remove_merged(self.folder):
            self.notes.append("the folder merged of an earlier call is no longer recommended, and was removed")
            self.progress.note(self.notes[-1])
        found = plain(
            self.objective,
            self.domains,
            self.tried,
            self.around,
            ends,
            kept,
            held_out=self.bench.table.count([HELD]),
            winner=self.best[1],
            recommended=recommended,
            merged=merged,
            notes=self.notes,
        )
        write_whole(self.folder.result, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return read_choice(self.folder.path)

    def _model(self, name: str, recipe: str) -> Model:
        return Model(key_of(recipe), name, self.folder.write_recipe(name, recipe))


def _shown(tried: Tried, number: int) -> Trial:
    """Return a recipe of the portfolio as a trial, for the progress."""
    verdict = tried.verdict
    return Trial(
        number=number,
        settings={},
        recipe=tried.recipe,
        values=None if verdict is None else verdict.values,
        stderr=() if verdict is None else tuple(e.stderr for e in verdict.estimates),
        feasible=True,
        items=0 if verdict is None else verdict.items,
        stopped=verdict is not None and verdict.stopped,
        same_as=None,
        failed=tried.failed,
        seconds=tried.seconds,
        label=tried.name,
    )
