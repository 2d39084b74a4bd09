"""Plan and merge a recipe: the entry points for Python and the command line.

A recipe may have several documents (stages), and each may name the output of another one as a model. The last one to
run is the target; `stages.py` knows which others run, and keeps their outputs.

A recipe may name data in place of statistics from data. Then the models are calibrated on them first, into the folder
`.OUT.statistics` or into the one that the recipe names.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MergeError, did_you_mean
from ..recipe import Recipe, load_recipes
from .either import lay_out_either, run_either, the_model
from .notebook import NotebookProgress, in_notebook
from .stages import folder_name, made_stages, needed_stages, run_stage, with_folders

if TYPE_CHECKING:
    from ..calibration.recipes.home import StatisticsHome
    from .adapters.plan import AdapterPlan
    from .plan.plan import Plan
    from .run import Progress, Result

__all__ = ["RecipeLike", "merge", "plan", "plan_with_stages_made"]

_OPTIONS = ("seed", "out_shard_size", "threads", "device", "max_memory", "cache_dir", "stream")
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
        **options: As for `merganser.engine.planner.planner.build_plan`: `seed`, `out_shard_size`, `threads`, `device`,
            `max_memory`, `cache_dir`, `stream`.

    Returns:
        The plan of the target, a model or an adapter; its `stages` are the plans of the other documents, whose outputs it reads.

    Raises:
        MergeError: The recipe or its inputs cannot be merged; the message says why.
    """
    _check_options(plan, options)
    return _plan(recipe, keep_stages=keep_stages, **options)


def _plan(recipe: RecipeLike, *, keep_stages: bool, **options: Any) -> Plan | AdapterPlan:
    """Plan as `plan` does, also with the options that are not for users, such as `permutations`."""
    needed = needed_stages(_load(recipe), keep_stages)
    _check_stream(needed, options)
    if len(needed) == 1 and not needed[0].names_data:
        return _plan_one(needed[0], **options)
    planned: list[Plan | AdapterPlan] = []
    with tempfile.TemporaryDirectory(prefix="merganser-") as root:
        folders: dict[str, Path] = {}
        home = _home(needed, Path(root), options)
        for stage in needed:
            try:
                with_stages = with_folders(stage, folders)
                with_statistics, calibrations = home.plan(with_stages) if home else (with_stages, [])
                unmade = [str(path) for path in folders.values()]
                found = _plan_one(with_statistics, unmade=unmade, **options)
            except MergeError as error:
                raise type(error)(str(error).replace(f"{root}{os.sep}", "stage ")) from None
            made = {str(path): name for name, path in folders.items()}
            shown = _unmeasured(the_model(found)) if calibrations else found
            planned.append(replace(shown, recipe=with_stages, made=made, calibrations=calibrations))
            if stage.name is not None and stage is not needed[-1]:
                folders[stage.name] = Path(root, folder_name(stage.name))
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
        keep_stages: Run all documents and keep their outputs in `.OUT.stages` next to the target, also those that no later one
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
    from .output.beside import continued_folder_beside
    from .output.staging import check_target

    _check_options(merge, options)
    if progress is None and in_notebook():
        progress = NotebookProgress()
    out, recipes = Path(out), _load(recipe)
    _check_stream(recipes, options)
    given: dict[str, Any] = {"allow_nonfinite": allow_nonfinite, "cluster": cluster, "progress": progress}
    with contextlib.ExitStack() as stack:
        if any(each.align for each in recipes):
            check_target(out, overwrite=overwrite)
            options["permutations"] = stack.enter_context(continued_folder_beside(out, "permutations", fresh=fresh))
        if len(recipes) == 1 and not recipes[0].names_data:
            return run_either(_plan_one(recipes[0], **options), out, overwrite=overwrite, fresh=fresh, **given)
        check_target(out, overwrite=overwrite)
        # plan everything first, so that an error in any stage or in the data shows before the first one runs
        planned = _plan(recipes, keep_stages=keep_stages, **options)
        *stages, target = needed_stages(recipes, keep_stages)
        home = stack.enter_context(_statistics(out, planned, fresh, options))
        made = stack.enter_context(made_stages(out, keep=keep_stages, fresh=fresh)) if len(recipes) > 1 else None
        folders: dict[str, Path] = {}
        for stage in stages:
            assert stage.name is not None
            assert made is not None
            one = _plan_one(_calibrated(with_folders(stage, folders), home, progress), **options)
            folder = folders[stage.name] = made.home / folder_name(stage.name)
            made.made[folder.name] = run_stage(one, folder, out, **given)
        whole = "".join(_ended(r.text) for r in sorted(recipes, key=lambda r: r.place.line))
        last = replace(_calibrated(with_folders(target, folders), home, progress), text=whole)
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
    planned = the_model(plan(recipes, **options))
    *stages, target = needed_stages(recipes, keep_stages=False)
    if not stages and not target.names_data:
        yield planned
        return
    with tempfile.TemporaryDirectory(prefix="merganser-") as root:
        folders: dict[str, Path] = {}
        home = _home(recipes, Path(root), options)
        for stage in stages:
            assert stage.name is not None
            folder = Path(root, folder_name(stage.name))
            run_either(_plan_one(_calibrated(with_folders(stage, folders), home), **options), folder)
            folders[stage.name] = folder
        yield the_model(_plan_one(_calibrated(with_folders(target, folders), home), **options))


def _home(recipes: Sequence[Recipe], root: Path, options: Mapping[str, Any]) -> StatisticsHome | None:
    """Return where statistics are planned or made in a temporary folder; None where no recipe names data."""
    if not any(recipe.names_data for recipe in recipes):
        return None
    from ..calibration.recipes.home import StatisticsHome

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
    from ..calibration.recipes.home import statistics_home

    cache_dir, plan_merge = options.get("cache_dir"), partial(_plan_model, measured=False, **options)
    with statistics_home(out, calibrations, fresh=fresh, cache_dir=cache_dir, plan_merge=plan_merge) as home:
        yield home


def _check_stream(recipes: Sequence[Recipe], options: Mapping[str, Any]) -> None:
    if options.get("stream"):
        # imports torch, which errors of the recipe need not wait for
        from .plan.remote import refuse_calibration

        refuse_calibration(recipes)


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
    from .planner.planner import build_plan

    if recipe.random_seed is not None:
        options.setdefault("seed", recipe.random_seed)
    if merges_adapters(recipe):
        return plan_adapters(
            recipe, **{key: value for key, value in options.items() if key in ("seed", "cache_dir", "stream")}
        )
    return build_plan(recipe, **options)
