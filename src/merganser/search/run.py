"""Search the free values of a recipe."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.either import the_model
from ..engine.kernels.devices import resolve_devices
from ..engine.merge import plan
from ..errors import RecipeError, TaskError, UnsupportedError
from ..evaluation.roster import make_roster
from ..evaluation.run import BATCH_TOKENS, Wanted
from ..evaluation.scoring.tasks import Task, load_tasks
from ..files import write_whole
from ..inference.sources import Reference
from ..recipe import Recipe, check_recipe, load_recipes
from ..recipe.load import RecipeSource, read_documents
from ..version import __version__
from ..wording import default_names
from .bench import Model, open_bench
from .command import parse_command
from .ends import End, average_of, best_single, measure_ends, to_json
from .estimated import Estimated, check_estimator
from .evolve import read_evolve
from .folder import Folder, key_of, open_folder
from .items import HELD, refuse_harness
from .judge import CommandJudge, ItemJudge, Judge
from .objectives import Objective, parse_bounds, parse_objectives
from .space import Space
from .study import Study, choose_sampler
from .trials import Progress, Silent, Trial, Trials

TRIALS = 50
TIMEOUT = 3600.0
_FRONT_SHOWN = 8


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        folder: The folder of the search.
        objectives: What was improved.
        trials: All trials.
        front: The best trial, or with several objectives those that none beats in all.
        ends: Winners, inputs and average on the items held out; empty if the search was stopped before.
        held_out: Number of items held out; 0 where a command judges.
        sampler: The sampler.
        notes: What the user should know.
    """

    folder: Path
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    ends: tuple[End, ...]
    held_out: int
    sampler: str
    notes: tuple[str, ...]

    @property
    def best(self) -> Trial | None:
        """The first of the front; None if no trial keeps the bounds."""
        return self.front[0] if self.front else None

    @property
    def best_single(self) -> End | None:
        """The best of the models that were merged, on the items held out, by the first objective."""
        return best_single(self.ends, self.objectives[0])

    def recipe_file(self, trial: Trial) -> Path:
        """Return the plain recipe of a trial."""
        return self.folder / "recipes" / f"{trial.name}.yaml"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data: format 1 of docs/search.md."""
        return {
            "kind": "search result",
            "format": 1,
            "objectives": [{"objective": o.text, "direction": o.direction} for o in self.objectives],
            "sampler": self.sampler,
            "trials": [
                {key: value for key, value in vars(trial).items() if key not in ("recipe", "label")}
                | {"recipe": trial.name}
                for trial in self.trials
            ],
            "front": [trial.number for trial in self.front],
            "held_out": self.held_out,
            "ends": to_json(self.ends, self.objectives),
            "notes": list(self.notes),
        }


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed; the same call continues the search.

    Args:
        found: What was found so far, without ends.
    """

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found


def search(
    recipe: RecipeSource,
    out: str | Path,
    tasks: Sequence[str | Path] | Mapping[str, str | Path] = (),
    *,
    command: str | None = None,
    timeout: float = TIMEOUT,
    objectives: Sequence[str] = (),
    at_least: Sequence[str] = (),
    at_most: Sequence[str] = (),
    base: Reference | None = None,
    experts: Mapping[str, Reference] | Sequence[str] = (),
    trials: int | None = None,
    hours: float | None = None,
    sampler: str = "auto",
    seed: int = 0,
    limit: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    early_stopping: bool = True,
    estimator: str | None = None,
    item_parameters: str | Path | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """Find the free values of a recipe by trying them, and prove the best on items that no trial saw.

    Args:
        recipe: The recipe, with values such as `{search: [0, 1]}`: a path, a YAML text, a mapping.
        out: Folder of the search; the same call continues one that was stopped.
        tasks: Texts, and questions or documents, as for `evaluate`; half of the items of each are held out.
        command: An external command instead of tasks; it gets the folder of a merge for `{model}`, and prints a JSON
            object of numbers.
        timeout: Seconds after which the command is ended.
        objectives: What to improve: `TASK/METRIC`, `recovered/mean`, `recovered/worst`, `forgotten/mean`, a weighted
            sum, or NAME:maximize of a command. By default `recovered/mean` with experts, else the mean of the tasks' main
            metric. Several give a front.
        at_least: Bounds, `NAME=NUMBER`.
        at_most: Bounds.
        base: The base, for what a merge recovers and forgets.
        experts: The model trained for a task, as for `evaluate`.
        trials: Number of trials, those of earlier calls included; by default 50, with `hours` as many as they allow.
        hours: Time after which no trial begins.
        sampler: auto, cma, tpe, gp, random, nsga2, nsga3, greedy, particles, quadratic or m2n2.
        seed: Seed of the sampler and of the division of the items.
        limit: Number of items of each task, both halves together.
        context: As for `evaluate`.
        stride: As for `evaluate`.
        dtype: As for `evaluate`.
        device: As for `evaluate`.
        batch_tokens: As for `evaluate`.
        early_stopping: Whether a trial ends once it is worse than the best one beyond chance; only with one objective.
        estimator: p_irt, gp_irt, mp_irt or gmp_irt: a trial that is not better than the best one by this estimate ends after
            the first wave of items; None for a test of the difference.
        item_parameters: File with the parameters of the items; by default they are fitted to the answers of this search.
        cache_dir: Folder for models from the Hub.
        progress: Receives the progress.

    Raises:
        MergeError: The recipe, a task, an option or the folder is wrong; the message says why.
        Interrupted: Ctrl-C was pressed.
    """
    progress = progress or Silent()
    documents = read_documents(recipe)
    evolve = read_evolve(documents[0], cache_dir)
    if evolve is not None and command is None and not tasks:
        raise TaskError(
            f"tasks: those of this file ({', '.join(evolve[1]) or 'none'}) are of lm-eval, which mergekit-evolve runs; give "
            "--tasks of your own, or a --command that runs lm-eval"
        )
    space = Space(documents if evolve is None else evolve[0])
    _check_numbers(trials=trials, hours=hours, timeout=timeout)
    if (command is None) == (not tasks):
        raise TaskError("tasks: give --tasks, whose items are scored, or --command, which scores a merge; one of them")
    parameters = None if item_parameters is None else Path(item_parameters)
    check_estimator(estimator, parameters, command=command is not None, early_stopping=early_stopping)
    start = load_recipes(space.resolve(space.start()))
    for each in start:
        check_recipe(each)
    trials = TRIALS if trials is None and hours is None else trials
    deadline = None if hours is None else time.monotonic() + 3600 * hours
    with open_folder(Path(out)) as folder:
        if command is not None:
            setup = _by_command(start, command, timeout, objectives, at_least, at_most, folder)
        else:
            loaded = load_tasks(tasks)
            wanted = Wanted(limit, context, stride, dtype, batch_tokens, resolve_devices(device)[0])
            items = _by_items(
                start, loaded, wanted, base, experts, folder, seed, cache_dir, early_stopping, estimator, parameters
            )
            setup = items.with_objectives(objectives, at_least, at_most)
        judge = setup.judge
        chosen = _sampler(folder, sampler, space, judge, trials)
        given: dict[str, Any] = {"recipe": _digest(space), "seed": seed, "sampler": chosen}
        given |= {"objectives": [o.text for o in judge.objectives], "bounds": [str(bound) for bound in judge.bounds]}
        given |= {"version of merganser": __version__, **setup.given}
        folder.check(given)
        directions = [objective.direction for objective in judge.objectives]
        study = Study(folder.trials, space.dimensions, directions, chosen, seed, space.start())
        folder.begin(given)
        setup.measure_references(objectives, progress)
        running = Trials(study, space, judge, folder)
        try:
            running.run(trials, deadline, progress)
            return _prove(running, setup, start, folder, chosen, progress)
        except KeyboardInterrupt:
            raise Interrupted(_found(running, [], setup, folder, chosen)) from None


@dataclass(frozen=True)
class Setup:
    """What trials of a search are judged by.

    Args:
        judge: The judge.
        inputs: The models that are merged, base and experts.
        given: What must not change when the search is continued.
        held_out: Number of items held out.
    """

    judge: Judge
    inputs: tuple[Model, ...]
    given: Mapping[str, Any]
    held_out: int

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        return self.judge.notes if isinstance(self.judge, ItemJudge) else []

    def with_objectives(self, objectives: Sequence[str], at_least: Sequence[str], at_most: Sequence[str]) -> Setup:
        """Give a judge of items its objectives, and return this."""
        assert isinstance(self.judge, ItemJudge)
        self.judge.objectives = parse_objectives(objectives, self.judge.known, self.judge.default)
        self.judge.bounds = parse_bounds(at_least, at_most, self.judge.known)
        if self.judge.estimated is not None:
            self.judge.estimated.check(self.judge.objectives, self.judge.bounds)
        return self

    def measure_references(self, objectives: Sequence[str], progress: Progress) -> None:
        """Score base and experts; refuse objectives of experts that do not count."""
        if isinstance(self.judge, ItemJudge):
            self.judge.measure_references()
            parse_objectives(objectives, self.judge.known, self.judge.default)
            for note in self.judge.notes:
                progress.note(note)


def _by_command(
    start: Sequence[Recipe],
    command: str,
    timeout: float,
    objectives: Sequence[str],
    at_least: Sequence[str],
    at_most: Sequence[str],
    folder: Folder,
) -> Setup:
    """Return the judge that runs a command."""
    words = parse_command(command)
    bounds = parse_bounds(at_least, at_most, None)
    judge = CommandJudge(words, timeout, folder.scratch, parse_objectives(objectives, None, None), bounds)
    folder.scratch.mkdir(exist_ok=True)
    # the command reads folders
    inputs = tuple(Model(f"model {path}", name, path) for name, path in _inputs(start).items() if Path(path).is_dir())
    return Setup(judge, inputs, {"command": command}, 0)


def _by_items(
    start: Sequence[Recipe],
    tasks: Sequence[Task],
    wanted: Wanted,
    base: Reference | None,
    experts: Mapping[str, Reference] | Sequence[str],
    folder: Folder,
    seed: int,
    cache_dir: Path | None,
    early_stopping: bool,
    estimator: str | None,
    parameters: Path | None,
) -> Setup:
    """Open the models and the items, and return the judge that scores them."""
    refuse_harness(tasks)
    the_model(plan(start, keep_stages=False, **({"cache_dir": cache_dir} if cache_dir else {})))
    roster = make_roster(_inputs(start), base, experts, [task.name for task in tasks])
    references = {entry.name: entry.reference for entry in roster.entries}
    bench, models = open_bench(references, tasks, wanted, folder.journal, seed, cache_dir)
    own = {task: models[name] for task, name in roster.experts.items()}
    parents = tuple(models.values())
    estimated = None if estimator is None else Estimated(estimator, bench.table, parents, parameters)
    origin = None if roster.base is None else models[roster.base]
    judge = ItemJudge(bench, origin, own, stopping=early_stopping, estimated=estimated)
    given = {
        "input": {name: model.key for name, model in models.items()},
        "task": {task.name: task.hash for task in tasks},
        "base": roster.base,
        "expert": dict(roster.experts),
        "limit": wanted.limit,
        "context": wanted.context,
        "stride": wanted.stride,
        "dtype": wanted.dtype,
        "device": str(wanted.device),
        "batch of tokens": wanted.batch_tokens,
        "early stopping": early_stopping,
    }
    if estimator is not None:
        given |= {"estimator": estimator}
    if parameters is not None:
        given |= {"item parameters": hashlib.sha256(parameters.read_bytes()).hexdigest()}
    return Setup(judge, parents, given, bench.table.count([HELD]))


def _inputs(start: Sequence[Recipe]) -> dict[str, str]:
    """Return the models that a recipe names, by a short name."""
    stages = {recipe.name for recipe in start[:-1]}
    found = [*dict.fromkeys(str(m) for recipe in start for m in recipe.references() if m.path not in stages)]
    return dict(zip(default_names(found), found, strict=True))


def _sampler(folder: Folder, wanted: str, space: Space, judge: Judge, trials: int | None) -> str:
    """Return the sampler: where it is chosen automatically, that of the search which is continued."""
    chosen = choose_sampler(wanted, space.dimensions, len(judge.objectives), len(judge.bounds), trials)
    if chosen == "m2n2" and not isinstance(judge, ItemJudge):
        raise UnsupportedError("sampler: m2n2 needs the score of each item (--tasks); with a command take tpe, or cma")
    known = (folder.settings() or {}).get("sampler", chosen)
    # more trials may be asked for than before; the sampler stays
    return str(known) if wanted == "auto" else chosen


def _digest(space: Space) -> str:
    """Return a hash of a recipe with its free values."""
    parts = [space.resolve(space.start()), *(str(dimension) for dimension in space.dimensions)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _prove(
    running: Trials, setup: Setup, start: Sequence[Recipe], folder: Folder, sampler: str, progress: Progress
) -> Found:
    """Measure winner, inputs and average on what no trial saw."""
    front = _found(running, [], setup, folder, sampler).front
    if not front:
        return _found(running, [], setup, folder, sampler)
    contenders = [(running.written(trial), "winner") for trial in front[:_FRONT_SHOWN]]
    contenders += [(model, "input") for model in setup.inputs] + _average(start, folder)
    return _found(running, measure_ends(contenders, setup.judge, progress), setup, folder, sampler)


def _found(running: Trials, ends: Sequence[End], setup: Setup, folder: Folder, sampler: str) -> Found:
    """Return what is known so far, and write it."""
    objectives = tuple(setup.judge.objectives)
    best = running.best
    front = running.front if len(objectives) > 1 else [] if best is None else [best]
    trials = tuple(running.over)
    found = Found(
        folder.path, objectives, trials, tuple(front), tuple(ends), setup.held_out, sampler, tuple(setup.notes)
    )
    _write(found, folder)
    return found


def _average(start: Sequence[Recipe], folder: Folder) -> list[tuple[Model, str]]:
    text = average_of(start)
    if text is None:
        return []
    return [(Model(key_of(text), "average", folder.write_recipe("average", text)), "average")]


def _write(found: Found, folder: Folder) -> None:
    write_whole(folder.result, json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n")
    best = found.best
    if best is not None and len(found.objectives) == 1 and best.values:
        about = (
            f"# found by merganser search: trial {best.number + 1} of {len(found.trials)}, {found.objectives[0].text} "
        )
        write_whole(folder.winner, f"{about}{best.values[0]:.6g} on the items of the trials\n{best.recipe}")


def _check_numbers(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise RecipeError(f"{name}: must be above 0, got {value:g}")
