"""What a search needs before its first trial: the space, the judge, the study, all checked against what it was begun with."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..engine.either import the_model
from ..engine.merge import plan
from ..errors import RecipeError, TaskError, UnsupportedError
from ..evaluation.roster import make_roster
from ..evaluation.run import Wanted
from ..evaluation.scoring.harness_arguments import parse_arguments
from ..evaluation.scoring.tasks import HarnessTask, load_tasks
from ..inference.sources import Reference
from ..recipe import Recipe, check_recipe, load_recipes
from ..recipe.document.parsing import parse_mapping
from ..recipe.load import RecipeSource, read_documents
from ..version import __version__
from ..wording import default_names
from .evolve import read_evolve
from .folder import Folder, key_of
from .many.storage import shown
from .scoring.bench import Failed, Model, open_bench
from .scoring.command import parse_command
from .scoring.estimated import Estimated, check_estimator
from .scoring.items import HELD
from .scoring.judge import CommandJudge, ItemJudge, Judge
from .scoring.objectives import parse_bounds, parse_objectives
from .space.space import Space
from .study import NAME, Study, choose_sampler
from .trials import Progress, Trials


@dataclass(frozen=True)
class Request:
    """What a search was asked for; see `search` for the fields."""

    recipe: RecipeSource
    tasks: Sequence[str | Path] | Mapping[str, str | Path]
    command: str | None
    timeout: float
    objectives: Sequence[str]
    at_least: Sequence[str]
    at_most: Sequence[str]
    base: Reference | None
    experts: Mapping[str, Reference] | Sequence[str]
    trials: int | None
    hours: float | None
    sampler: str
    seed: int
    wanted: Wanted
    early_stopping: bool
    estimator: str | None
    item_parameters: Path | None
    storage: str | None
    cache_dir: Path | None

    def completed(self) -> tuple[Request, list[str]]:
        """Return the request with what a file of mergekit-evolve says, where it is not given, and what the user should know.

        Raises:
            MergeError: The file is wrong.
        """
        evolve = read_evolve(read_documents(self.recipe)[0], self.cache_dir)
        if evolve is None:
            return self, []
        notes = [f"{key}: of mergekit-evolve, has no effect here" for key in evolve.without_effect]
        if self.command is not None:
            if evolve.tasks:
                notes.append("tasks: of the file are not used, since a command scores the merges")
            return self, notes
        if not self.tasks and evolve.objective is None:
            return self, notes
        objectives, wanted = self.objectives, self.wanted
        given = load_tasks(self.tasks) if self.tasks else []
        missing = sorted({*evolve.tasks} - {task.name for task in given}) if given else []
        if not objectives and evolve.objective is not None and not missing:
            objectives = [evolve.objective]
        elif missing:
            notes.append(
                f"tasks: {', '.join(missing)} of the file is not among --tasks, which replace those of the file"
            )
        arguments = wanted.harness
        if not arguments and (not given or any(isinstance(task, HarnessTask) for task in given)):
            arguments = parse_arguments(evolve.arguments)
        elif not arguments and evolve.arguments:
            notes.append(f"{', '.join(evolve.arguments)}: has no effect, since no task is of lm-eval")
        limit = evolve.limit if wanted.limit is None else wanted.limit
        wanted = replace(wanted, limit=limit, harness=arguments)
        return replace(self, tasks=self.tasks or evolve.tasks, objectives=objectives, wanted=wanted), notes

    def check(self) -> tuple[Space, list[Recipe]]:
        """Check what can be checked without models, and return the space and the recipe at its start.

        Raises:
            MergeError: Something is wrong.
        """
        documents = read_documents(self.recipe)
        evolve = read_evolve(documents[0], self.cache_dir)
        space = Space(documents if evolve is None else evolve.recipe)
        for name, value in (("trials", self.trials), ("hours", self.hours), ("timeout", self.timeout)):
            if value is not None and not value > 0:
                raise RecipeError(f"{name}: must be above 0, got {value:g}")
        if (self.command is None) == (not self.tasks):
            raise TaskError(
                "tasks: give --tasks, whose items are scored, or --command, which scores a merge; one of them"
            )
        check_estimator(
            self.estimator, self.item_parameters, command=self.command is not None, early_stopping=self.early_stopping
        )
        start = load_recipes(space.resolve(space.start()))
        for each in start:
            check_recipe(each)
        return space, start


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

    def missed(self, model: Model) -> list[str]:
        """Return which bounds a model that keeps them on the items of trials misses on those held out, in words."""
        if not isinstance(self.judge, ItemJudge) or not self.judge.bounds:
            return []
        try:
            figures = self.judge.figures(model, [HELD])
        except Failed:
            return []
        return [
            f"{model.name} misses a bound on the items held out: {bound}, and it has {figures[bound.name].value:.4g}"
            for bound in self.judge.bounds
            if bound.excess(figures) > 0
        ]

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
            self.judge.measure_references(tell=progress.measuring)
            parse_objectives(objectives, self.judge.known, self.judge.default)
            for note in self.judge.notes:
                progress.note(note)


@dataclass(frozen=True)
class Prepared:
    """A search that is ready for trials.

    Args:
        trials: Carries them out.
        setup: What they are judged by.
        start: The recipe at the start of the space.
        sampler: The sampler.
    """

    trials: Trials
    setup: Setup
    start: Sequence[Recipe]
    sampler: str


def prepare(request: Request, space: Space, start: Sequence[Recipe], folder: Folder, progress: Progress) -> Prepared:
    """Open models, items and the study, and measure the references.

    Args:
        request: What was asked for.
        space: From `Request.check`.
        start: From `Request.check`.
        folder: The folder of the search.
        progress: Receives notes.

    Raises:
        MergeError: Something is wrong, or was different when the search was begun.
    """
    setup = (
        _by_command(request, space, start, folder)
        if request.command is not None
        else _by_items(request, space, start, folder)
    )
    judge = setup.judge
    with folder.claims.turn("settings"):
        known = folder.settings() or {}
        chosen = _sampler(known, request, space, judge)
        given: dict[str, Any] = {"recipe": _digest(space), "seed": request.seed, "sampler": chosen}
        given |= {"objectives": [o.text for o in judge.objectives], "bounds": [str(bound) for bound in judge.bounds]}
        given |= {"version of merganser": __version__, **setup.given}
        if request.storage is not None:
            # the studies of a database are many, and this folder's has a name of its own
            given |= {"storage": shown(request.storage), "study": known.get("study", f"{NAME}-{uuid.uuid4().hex[:12]}")}
        folder.check(given)
        directions = [objective.direction for objective in judge.objectives]
        study = Study(
            folder.trials if request.storage is None else request.storage,
            space.dimensions,
            directions,
            chosen,
            request.seed,
            space.start(),
            name=given.get("study", NAME),
            claims=folder.claims,
        )
        folder.begin(given)
    with folder.claims.turn("references", lambda: progress.note("another process measures the models; waiting for it")):
        folder.journal.refresh()
        setup.measure_references(request.objectives, progress)
    return Prepared(Trials(study, space, judge, folder), setup, start, chosen)


def _by_command(request: Request, space: Space, start: Sequence[Recipe], folder: Folder) -> Setup:
    """Return the judge that runs a command."""
    assert request.command is not None
    words = parse_command(request.command)
    bounds = parse_bounds(request.at_least, request.at_most, None)
    objectives = parse_objectives(request.objectives, None, None)
    judge = CommandJudge(words, request.timeout, folder, objectives, bounds)
    inputs = tuple(_as_folder(name, path, folder) for name, path in _inputs(space, start).items())
    return Setup(judge, inputs, {"command": request.command}, 0)


def _as_folder(name: str, path: str, folder: Folder) -> Model:
    """Return a model that a command can read: what is not a folder, as of the Hub or with an adapter, is merged alone."""
    if Path(path).is_dir():
        return Model(f"model {path}", name, path)
    alone = parse_mapping({"merge_method": "passthrough", "models": [{"model": path}]}, "<input>").text
    key = key_of(alone)
    return Model(key, name, folder.write_recipe(f"input-{key.rpartition(' ')[2][:12]}", alone))


def _by_items(request: Request, space: Space, start: Sequence[Recipe], folder: Folder) -> Setup:
    """Open the models and the items, and return the judge that scores them."""
    tasks, wanted, cache_dir = load_tasks(request.tasks), request.wanted, request.cache_dir
    the_model(plan(start, keep_stages=False, **({"cache_dir": cache_dir} if cache_dir else {})))
    roster = make_roster(_inputs(space, start), request.base, request.experts, [task.name for task in tasks])
    references = {entry.name: entry.reference for entry in roster.entries}
    bench, models = open_bench(references, tasks, wanted, folder.journal, request.seed, cache_dir)
    own = {task: models[name] for task, name in roster.experts.items()}
    parents = tuple(models.values())
    parameters = request.item_parameters
    estimated = None if request.estimator is None else Estimated(request.estimator, bench.table, parents, parameters)
    origin = None if roster.base is None else models[roster.base]
    judge = ItemJudge(bench, origin, own, stopping=request.early_stopping, estimated=estimated)
    given = {
        "input": {name: model.key for name, model in models.items()},
        "task": {name: split.hash for name, split in bench.table.splits.items()},
        "base": roster.base,
        "expert": dict(roster.experts),
        "limit": wanted.limit,
        "context": wanted.context,
        "stride": wanted.stride,
        "dtype": wanted.dtype,
        "device": str(wanted.device),
        "batch of tokens": wanted.batch_tokens,
        "early stopping": request.early_stopping,
    }
    if wanted.harness:
        given |= {"lm-eval": wanted.harness.to_json()}
    if request.estimator is not None:
        given |= {"estimator": request.estimator}
    if parameters is not None:
        given |= {"item parameters": hashlib.sha256(parameters.read_bytes()).hexdigest()}
    setup = Setup(judge, parents, given, bench.table.count([HELD]))
    return setup.with_objectives(request.objectives, request.at_least, request.at_most)


def _inputs(space: Space, start: Sequence[Recipe]) -> dict[str, str]:
    """Return the models that recipes of the space name, by a short name."""
    stages = {recipe.name for recipe in start[:-1]}
    named = [str(m) for recipe in start for m in recipe.references() if m.path not in stages]
    found = [*dict.fromkeys([*named, *(model for model in space.models if model not in stages)])]
    return dict(zip(default_names(found), found, strict=True))


def _sampler(known: Mapping[str, Any], request: Request, space: Space, judge: Judge) -> str:
    """Return the sampler: where it is chosen automatically, that of the search which is continued."""
    chosen = choose_sampler(request.sampler, space.dimensions, len(judge.objectives), len(judge.bounds), request.trials)
    if chosen == "m2n2" and not isinstance(judge, ItemJudge):
        raise UnsupportedError("sampler: m2n2 needs the score of each item (--tasks); with a command take tpe, or cma")
    # more trials may be asked for than before; the sampler stays
    return str(known.get("sampler", chosen)) if request.sampler == "auto" else chosen


def _digest(space: Space) -> str:
    """Return a hash of a recipe with its free values."""
    parts = [space.resolve(space.start()), *(str(dimension) for dimension in space.dimensions)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
