"""Plan and merge a recipe: the entry points for Python and the command line.

A recipe may have several documents (stages), and each may name the output of another one as a model. The last one to
run is the target. The others are written to the folder `.OUT.stages` next to it, each under its name; a finished stage
is reused as long as nothing that it was merged from has changed.

A recipe may name data in place of statistics from data. Then the models are calibrated on them first, into the folder
`.OUT.statistics` or into the one that the recipe names.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.hub import is_hub_id
from ..errors import MergeError, OutputError, RecipeError, did_you_mean
from ..jsonfile import exists, read_object
from ..recipe import ModelReference, Recipe, Slice, Source, load_recipes
from .either import lay_out_either, run_either, the_model
from .notebook import NotebookProgress, in_notebook

if TYPE_CHECKING:
    from ..calibration.home import StatisticsHome
    from .adapters.plan import AdapterPlan
    from .output.ownership import Owned
    from .plan.plan import Plan
    from .run import Progress, Result

__all__ = ["RecipeLike", "merge", "plan", "plan_with_stages_made", "stages_folder"]

_OPTIONS = ("seed", "out_shard_size", "threads", "device", "max_memory", "cache_dir")
"""Keyword arguments that are passed on to `build_plan`."""

_STATISTICS = ".statistics"
"""Folder of statistics among those of stages, which cannot have this name."""

RecipeLike = Recipe | Sequence[Recipe] | str | Path | Mapping[str, Any]
"""Recipes from `load_recipe` or `load_recipes`, or what these read: a path, a YAML text, a mapping."""


def plan(recipe: RecipeLike, *, keep_stages: bool = False, **options: Any) -> Plan | AdapterPlan:
    """Plan a merge from the headers of its inputs; nothing is written.

    Args:
        recipe: A recipe of one document or several: its path, its YAML text, a mapping, or loaded recipes.
        keep_stages: Also plan stages that no later one uses.
        **options: As for `merganser.engine.planner.build_plan`: `seed`, `out_shard_size`, `threads`, `device`,
            `max_memory`, `cache_dir`.

    Returns:
        The plan of the target, a model or an adapter; its `stages` are the plans of the other documents, whose outputs it reads.

    Raises:
        MergeError: The recipe or its inputs cannot be merged; the message says why.
    """
    _check_options(plan, options)
    return _plan(recipe, keep_stages=keep_stages, **options)


def _plan(recipe: RecipeLike, *, keep_stages: bool, **options: Any) -> Plan | AdapterPlan:
    """Plan as `plan` does, also with the options that are not for users, such as `permutations`."""
    needed = _needed(_load(recipe), keep_stages)
    if len(needed) == 1 and not needed[0].names_data:
        return _plan_one(needed[0], **options)
    planned: list[Plan | AdapterPlan] = []
    with tempfile.TemporaryDirectory(prefix="merganser-") as root:
        folders: dict[str, Path] = {}
        home = _home(needed, Path(root), options)
        for stage in needed:
            try:
                with_stages = _with_folders(stage, folders)
                with_statistics, calibrations = home.plan(with_stages) if home else (with_stages, [])
                unmade = [str(path) for path in folders.values()]
                found = _plan_one(with_statistics, unmade=unmade, **options)
            except MergeError as error:
                raise type(error)(str(error).replace(f"{root}{os.sep}", "stage ")) from None
            made = {str(path): name for name, path in folders.items()}
            shown = _unmeasured(the_model(found)) if calibrations else found
            planned.append(replace(shown, recipe=with_stages, made=made, calibrations=calibrations))
            if stage.name is not None and stage is not needed[-1]:
                folders[stage.name] = Path(root, _folder_name(stage.name))
                lay_out_either(found, folders[stage.name])
    return replace(planned[-1], stages=tuple(planned[:-1]))


def _unmeasured(plan: Plan) -> Plan:
    """Return a plan without the numbers that follow from data, which are not measured yet."""
    from ..method import takes

    method = plan.method
    numbers = {name for name, own in method.located.items() if method.numbers.keys() & {*takes(own)}}
    if not numbers:
        return plan
    tensors = [
        replace(tensor, located={name: own for name, own in tensor.located.items() if name not in numbers})
        for tensor in plan.tensors
    ]
    return replace(plan, tensors=tensors)


def merge(
    recipe: RecipeLike,
    out: str | Path,
    *,
    keep_stages: bool = False,
    overwrite: bool = False,
    fresh: bool = False,
    allow_nonfinite: bool = False,
    cluster: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Merge models into a new checkpoint.

    Args:
        recipe: A recipe of one document or several: its path, its YAML text, a mapping, or loaded recipes.
        out: Target folder; it appears when the merge is complete.
        keep_stages: Run all documents and keep their outputs in `stages_folder(out)`, also those that no later one
            uses.
        overwrite: Replace a target that merganser wrote before, unless something in it was added or changed.
        fresh: Start again even if an interrupted run could be continued.
        allow_nonfinite: Merge NaN and infinity instead of raising an error.
        cluster: Address of a Ray cluster whose nodes share storage with this machine; None to run locally.
        progress: Gets reports of each run's progress; by default, a notebook shows it, and nothing else does.
        **options: As for `plan`.

    Returns:
        The folder and the run record of the target, which holds the text of all documents.

    Raises:
        MergeError: A recipe, an input or the target is invalid; the message says why.
        Interrupted: Ctrl-C was pressed; the same call continues the run.
    """
    from .output.staging import check_target
    from .permutation.keep import permutations_home

    _check_options(merge, options)
    if progress is None and in_notebook():
        progress = NotebookProgress()
    out, recipes = Path(out), _load(recipe)
    given: dict[str, Any] = {"allow_nonfinite": allow_nonfinite, "cluster": cluster, "progress": progress}
    with contextlib.ExitStack() as stack:
        if any(each.align for each in recipes):
            check_target(out, overwrite=overwrite)
            options["permutations"] = stack.enter_context(permutations_home(out, fresh=fresh))
        if len(recipes) == 1 and not recipes[0].names_data:
            return run_either(_plan_one(recipes[0], **options), out, overwrite=overwrite, fresh=fresh, **given)
        check_target(out, overwrite=overwrite)
        # plan everything first, so that an error in any stage or in the data shows before the first one runs
        planned = _plan(recipes, keep_stages=keep_stages, **options)
        *stages, target = _needed(recipes, keep_stages)
        home = stack.enter_context(_statistics(out, planned, fresh, options))
        made = stack.enter_context(_stages(out, keep=keep_stages, fresh=fresh)) if len(recipes) > 1 else None
        folders: dict[str, Path] = {}
        for stage in stages:
            assert stage.name is not None
            assert made is not None
            one = _plan_one(_calibrated(_with_folders(stage, folders), home, progress), **options)
            folder = folders[stage.name] = made.home / _folder_name(stage.name)
            made.made[folder.name] = _run_stage(one, folder, out, **given)
        whole = "".join(_ended(r.text) for r in sorted(recipes, key=lambda r: r.place.line))
        last = replace(_calibrated(_with_folders(target, folders), home, progress), text=whole)
        return run_either(_plan_one(last, **options), out, overwrite=overwrite, fresh=fresh, **given)


@contextlib.contextmanager
def plan_with_stages_made(recipe: RecipeLike, **options: Any) -> Iterator[Plan]:
    """Merge the stages of a recipe into a folder that exists during the context, and yield the plan of its target.

    Statistics from data that it lacks are made there, too.

    Args:
        recipe: As for `plan`.
        **options: As for `plan`.

    Raises:
        MergeError: A recipe or an input cannot be merged; the message says why.
    """
    recipes = _load(recipe)
    the_model(plan(recipes, **options))
    *stages, target = _needed(recipes, keep_stages=False)
    with tempfile.TemporaryDirectory(prefix="merganser-") as root:
        folders: dict[str, Path] = {}
        home = _home(recipes, Path(root), options)
        for stage in stages:
            assert stage.name is not None
            folder = Path(root, _folder_name(stage.name))
            run_either(_plan_one(_calibrated(_with_folders(stage, folders), home), **options), folder)
            folders[stage.name] = folder
        yield the_model(_plan_one(_calibrated(_with_folders(target, folders), home), **options))


def _home(recipes: Sequence[Recipe], root: Path, options: Mapping[str, Any]) -> StatisticsHome | None:
    """Return where statistics are planned or made in a temporary folder; None where no recipe names data."""
    if not any(recipe.names_data for recipe in recipes):
        return None
    from ..calibration.home import StatisticsHome

    return StatisticsHome(root / _STATISTICS, options.get("cache_dir"), partial(_plan_model, measured=False, **options))


@contextlib.contextmanager
def _statistics(
    out: Path, planned: Plan | AdapterPlan, fresh: bool, options: Mapping[str, Any]
) -> Iterator[StatisticsHome | None]:
    """Yield where a merge makes the statistics that it lacks; None where it lacks none."""
    calibrations = [each for one in (*planned.stages, planned) for each in one.calibrations]
    if not calibrations:
        yield None
        return
    from ..calibration.home import statistics_home

    cache_dir, plan_merge = options.get("cache_dir"), partial(_plan_model, measured=False, **options)
    with statistics_home(out, calibrations, fresh=fresh, cache_dir=cache_dir, plan_merge=plan_merge) as home:
        yield home


def _check_options(function: Callable[..., object], options: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that `build_plan` does not take, with a suggestion.

    Raises:
        TypeError: There is one.
    """
    own = [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    known = [*own, *_OPTIONS]
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(
                f"{function.__name__}: unknown argument {name!r}.{did_you_mean(name, known)} "
                f"{function.__name__} takes {', '.join(sorted(known))}"
            )


def _calibrated(recipe: Recipe, home: StatisticsHome | None, progress: Progress | None = None) -> Recipe:
    """Make the statistics that a recipe lacks, and return the recipe with them."""
    return recipe if home is None else home.make(recipe, progress)


def stages_folder(out: str | Path) -> Path:
    """Return the folder next to a target that holds the outputs of its other stages."""
    return Path(out).with_name(f".{Path(out).name}.stages")


def _needed(recipes: Sequence[Recipe], keep_stages: bool) -> list[Recipe]:
    """Return the recipes to run, in order: the target last, and without stages whose output no recipe reads."""
    *others, target = recipes
    if keep_stages:
        return [*others, target]
    needed = [target]
    for recipe in reversed(others):
        if any(recipe.name in model.paths for later in needed for model in later.references()):
            needed.insert(0, recipe)
    warnings = [
        f"{recipe.place}: no later recipe uses the result of {recipe.name!r}, so it is not run; "
        "--keep-stages runs it and keeps the result"
        for recipe in others
        if recipe not in needed
    ]
    warnings += _shadowed(needed)
    return [*needed[:-1], replace(target, warnings=(*target.warnings, *warnings))]


def _shadowed(recipes: Sequence[Recipe]) -> list[str]:
    """Return a warning for each earlier result that is used where a folder or a model on the Hub has the same name."""
    warnings: list[str] = []
    earlier: dict[str, Recipe] = {}
    for recipe in recipes:
        for path in dict.fromkeys(model.path for model in recipe.references() if model.path in earlier):
            other = "the path" if exists(path) else "the model on the Hub" if is_hub_id(path) and "/" in path else None
            if other is not None:
                warnings.append(
                    f"{recipe.place}: {path!r} is the result of the recipe at {earlier[path].place}, not {other} of this "
                    "name; rename one of them if the other is meant"
                )
        if recipe.name is not None:
            earlier[recipe.name] = recipe
    return warnings


def _with_folders(recipe: Recipe, folders: Mapping[str, Path]) -> Recipe:
    """Return the recipe with the names of earlier stages replaced by their folders."""

    def reference(model: ModelReference) -> ModelReference:
        for path, revision in ((model.path, model.revision), (model.lora, model.lora_revision)):
            if path in folders and revision is not None:
                raise RecipeError(
                    f"{recipe.place}: {model} names a revision, but {path!r} is the result of an earlier recipe"
                )
        path = str(folders.get(model.path, model.path))
        return replace(model, path=path, lora=model.lora and str(folders.get(model.lora, model.lora)))

    def optional(model: ModelReference | None) -> ModelReference | None:
        return None if model is None else reference(model)

    def source(each: Source) -> Source:
        return replace(each, model=reference(each.model))

    def piece(each: Slice) -> Slice:
        return replace(each, sources=tuple(source(s) for s in each.sources), base_model=optional(each.base_model))

    return replace(
        recipe,
        models=tuple(source(each) for each in recipe.models),
        slices=tuple(piece(each) for each in recipe.slices),
        base_model=optional(recipe.base_model),
        align=recipe.align and replace(recipe.align, to=reference(recipe.align.to)),
        tokenizer_donor=optional(recipe.tokenizer_donor),
        token_rules=tuple(replace(rule, model=optional(rule.model)) for rule in recipe.token_rules),
    )


def _folder_name(name: str) -> str:
    """Return the folder name of a stage; different stages have different names."""
    return name.replace("%", "%25").replace("/", "%2F").replace("\\", "%5C")


@dataclass(frozen=True, slots=True)
class _Stages:
    """The outputs of the stages.

    Args:
        home: The folder that holds them.
        made: Those that this run wrote or reused, by the name of their folder.
    """

    home: Path
    made: dict[str, Owned]

    def remove(self) -> None:
        """Remove the folder, unless it holds anything that merganser did not write."""
        from .output.ownership import survey_each

        with contextlib.suppress(OSError):
            survey_each(self.home, known=self.made).remove()


@contextlib.contextmanager
def _stages(out: Path, *, keep: bool, fresh: bool) -> Iterator[_Stages]:
    """Lock the folder of the stages; remove it at the end, unless the run can be continued."""
    from .output.failure import failures_of
    from .output.lock import lock_target
    from .output.ownership import survey_each

    home = stages_folder(out)
    # next to the folder, not in it, as the folder is created and removed under the lock
    lock = home.with_name(f"{home.name}.lock")
    guard = lock_target(out, lock)
    try:
        with failures_of(home):
            home.mkdir(exist_ok=True)
        # refuse foreign files now, not after hours of work; files not hashed here are hashed before they are removed
        found = survey_each(home, hashing=fresh)
        if fresh:
            found.remove()
            home.mkdir(exist_ok=True)
        stages = _Stages(home, {})
        try:
            yield stages
        except MergeError as error:
            if not keep and not isinstance(error, OutputError):
                stages.remove()
            raise
        if not keep:
            stages.remove()
    finally:
        guard.release()


def _run_stage(plan: Plan | AdapterPlan, folder: Path, out: Path, **given: Any) -> Owned:
    """Run one stage, unless its output exists, is unchanged, and was made from the same inputs."""
    from .adapters.plan import AdapterPlan
    from .output.ownership import STAGE_NOTE, survey
    from .record import fingerprint
    from .run import Interrupted

    mark = (
        plan.fingerprint()
        if isinstance(plan, AdapterPlan)
        else fingerprint(plan, {"allow_nonfinite": given["allow_nonfinite"]})
    )
    note = folder / STAGE_NOTE
    with contextlib.suppress(OSError, ValueError):
        if read_object(note) == {"fingerprint": mark, "files": _files(folder)}:
            return survey(folder, hashing=False)
    survey(folder).remove()
    try:
        run_either(plan, folder, **given)
    except Interrupted:
        raise Interrupted(
            f"{out}: stopped while {plan.recipe.name!r} was made; run the same command again to continue"
        ) from None
    temporary = folder / f"{STAGE_NOTE}.new"
    temporary.write_text(json.dumps({"fingerprint": mark, "files": _files(folder)}), encoding="utf-8")
    temporary.replace(note)
    return survey(folder, hashing=False)


def _files(folder: Path) -> list[list[Any]]:
    """Return name, size and modification time of every file in a stage's folder."""
    from .output.ownership import STAGE_NOTE

    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(STAGE_NOTE))
    return [[path.relative_to(folder).as_posix(), (s := path.stat()).st_size, s.st_mtime_ns] for path in found]


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _load(recipe: RecipeLike) -> Sequence[Recipe]:
    if isinstance(recipe, Recipe):
        return [recipe]
    if isinstance(recipe, str | Path | Mapping):
        return load_recipes(recipe)
    return recipe


def _plan_model(recipe: Recipe, **options: Any) -> Plan:
    return the_model(_plan_one(recipe, **options))


def _plan_one(recipe: Recipe, **options: Any) -> Plan | AdapterPlan:
    from .adapters.plan import merges_adapters, plan_adapters
    from .planner import build_plan

    if recipe.random_seed is not None:
        options.setdefault("seed", recipe.random_seed)
    if merges_adapters(recipe):
        return plan_adapters(recipe, **{key: value for key, value in options.items() if key in ("seed", "cache_dir")})
    return build_plan(recipe, **options)
