"""Plan and merge a recipe: what Python and the command line call.

A recipe may have several documents (stages), and each may name the result of another one as a model. The last one in the
order of work is the target. The results of the others lie in a folder beside it, `.OUT.stages`, each under its name; a
stage that is finished there is used again as long as nothing that it was made from has changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MergeError, OutputError, RecipeError
from ..jsonfile import read_object
from ..recipe import ModelReference, Recipe, Slice, Source, load_recipes

if TYPE_CHECKING:
    from .output.ownership import Owned
    from .plan.plan import Plan
    from .run import Progress, Result

__all__ = ["RecipeLike", "merge", "plan", "plan_with_stages_made", "stages_folder"]

RecipeLike = Recipe | Sequence[Recipe] | str | Path | Mapping[str, Any]
"""Recipes as `load_recipe` and `load_recipes` return them, or what these read: a path, a YAML text, a mapping."""


def plan(recipe: RecipeLike, *, keep_stages: bool = False, **options: Any) -> Plan:
    """Plan a merge from the headers of its inputs; nothing is written.

    Args:
        recipe: A recipe of one document or several: its path, its YAML text, a mapping, or what was loaded from those.
        keep_stages: Plan stages that no later one uses, too.
        **options: As for `merganser.engine.planner.build_plan`: `seed`, `out_shard_size`, `threads`, `device`,
            `max_memory`, `cache_dir`, `compiled`.

    Returns:
        The plan of the target; its `stages` are the plans of the documents before it, whose results it reads.

    Raises:
        MergeError: The recipe or its inputs cannot be merged; the message says why.
    """
    needed = _needed(_load(recipe), keep_stages)
    if len(needed) == 1:
        return _plan_one(needed[0], **options)
    planned: list[Plan] = []
    with tempfile.TemporaryDirectory(prefix="merganser-") as root:
        folders: dict[str, Path] = {}
        for stage in needed:
            try:
                found = _plan_one(_with_folders(stage, folders), **options)
            except MergeError as error:
                raise type(error)(str(error).replace(f"{root}{os.sep}", "stage ")) from None
            planned.append(replace(found, made={str(path): name for name, path in folders.items()}))
            if stage.name is not None and stage is not needed[-1]:
                folders[stage.name] = Path(root, _folder_name(stage.name))
                _lay_out(found, folders[stage.name])
    return replace(planned[-1], stages=tuple(planned[:-1]))


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
        recipe: A recipe of one document or several: its path, its YAML text, a mapping, or what was loaded from those.
        out: Target folder; it appears, complete, when all is done.
        keep_stages: Keep the results of the other documents in `stages_folder(out)`, even those that no later one uses.
        overwrite: Replace a target that merganser wrote before, unless something in it was added or changed.
        fresh: Start again even where an interrupted run could be continued.
        allow_nonfinite: Merge NaN and infinity instead of refusing them.
        cluster: Address of a Ray cluster whose nodes share storage with this machine; None: work here.
        progress: Told how each run advances.
        **options: As for `plan`.

    Returns:
        The folder and the run record of the target, which holds the text of all documents.

    Raises:
        MergeError: A recipe, an input or the target is at fault; the message says why.
        Interrupted: Ctrl-C; the same call continues.
    """
    from .output.staging import check_target
    from .run import run_plan

    out, recipes = Path(out), _load(recipe)
    given: dict[str, Any] = {"allow_nonfinite": allow_nonfinite, "cluster": cluster, "progress": progress}
    if len(recipes) == 1:
        return run_plan(_plan_one(recipes[0], **options), out, overwrite=overwrite, fresh=fresh, **given)
    check_target(out, overwrite=overwrite)
    # whatever can be refused in any stage is refused before the first one runs
    plan(recipes, keep_stages=keep_stages, **options)
    *stages, target = _needed(recipes, keep_stages)
    with _stages(out, keep=keep_stages, fresh=fresh) as made:
        folders: dict[str, Path] = {}
        for stage in stages:
            assert stage.name is not None
            planned = _plan_one(_with_folders(stage, folders), **options)
            folder = folders[stage.name] = made.home / _folder_name(stage.name)
            made.made[folder.name] = _run_stage(planned, folder, out, **given)
        whole = "".join(_ended(r.text) for r in sorted(recipes, key=lambda r: r.place.line))
        last = replace(_with_folders(target, folders), text=whole)
        return run_plan(_plan_one(last, **options), out, overwrite=overwrite, fresh=fresh, **given)


@contextlib.contextmanager
def plan_with_stages_made(recipe: RecipeLike, **options: Any) -> Iterator[Plan]:
    """Plan the target of a recipe, and merge its other documents at once into a folder that lasts as long as the context.

    Args:
        recipe: As for `plan`.
        **options: As for `plan`.

    Raises:
        MergeError: A recipe or an input cannot be merged; the message says why.
    """
    from .run import run_plan

    recipes = _load(recipe)
    plan(recipes, **options)
    *stages, target = _needed(recipes, keep_stages=False)
    with tempfile.TemporaryDirectory(prefix="merganser-") as root:
        folders: dict[str, Path] = {}
        for stage in stages:
            assert stage.name is not None
            folder = Path(root, _folder_name(stage.name))
            run_plan(_plan_one(_with_folders(stage, folders), **options), folder)
            folders[stage.name] = folder
        yield _plan_one(_with_folders(target, folders), **options)


def stages_folder(out: str | Path) -> Path:
    """Return the folder beside a target where the results of its other recipes lie."""
    return Path(out).with_name(f".{Path(out).name}.stages")


def _needed(recipes: Sequence[Recipe], keep_stages: bool) -> list[Recipe]:
    """Return the recipes to run, in order: the target last, and without those whose result nobody reads."""
    *others, target = recipes
    if keep_stages:
        return [*others, target]
    needed = [target]
    for recipe in reversed(others):
        if any(model.path == recipe.name for later in needed for model in later.references()):
            needed.insert(0, recipe)
    warnings = [
        f"{recipe.place}: no recipe behind it uses the result of {recipe.name!r}, so it is not made; "
        "--keep-stages makes and keeps it"
        for recipe in others
        if recipe not in needed
    ]
    return [*needed[:-1], replace(target, warnings=(*target.warnings, *warnings))]


def _with_folders(recipe: Recipe, folders: Mapping[str, Path]) -> Recipe:
    """Return the recipe with the folders of earlier stages in the place of their names."""

    def reference(model: ModelReference) -> ModelReference:
        if model.path not in folders:
            return model
        if model.revision is not None:
            raise RecipeError(
                f"{recipe.place}: {model} names a revision, but {model.path!r} is the result of an earlier recipe"
            )
        return replace(model, path=str(folders[model.path]))

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
        tokenizer_donor=optional(recipe.tokenizer_donor),
    )


def _lay_out(plan: Plan, folder: Path) -> None:
    """Write what a plan's output will be, without its weights: headers, sizes (as holes), and the files beside them."""
    from .finish import write_planned_files

    try:
        folder.mkdir()
        for shard in plan.shards:
            with (folder / shard.name).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
        # later stages look at config and tokenizer
        write_planned_files(plan, folder)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None


def _folder_name(name: str) -> str:
    """Return a name for the folder of a stage; different stages have different ones, side by side."""
    return name.replace("%", "%25").replace("/", "%2F").replace("\\", "%5C")


@dataclass(frozen=True, slots=True)
class _Stages:
    """The results of the stages.

    Args:
        home: The folder in which they lie.
        made: Those that this run made, or found unchanged, by the name of their folder.
    """

    home: Path
    made: dict[str, Owned]

    def remove(self) -> None:
        """Remove all that is ours; nothing, where anything is not."""
        from .output.ownership import survey_each

        with contextlib.suppress(OSError):
            survey_each(self.home, known=self.made).remove()


@contextlib.contextmanager
def _stages(out: Path, *, keep: bool, fresh: bool) -> Iterator[_Stages]:
    """Hold the folder of the stages; remove it in the end, but for a run that can be continued."""
    from .output.lock import acquire_lock
    from .output.ownership import survey_each

    home = stages_folder(out)
    # beside the folder, which comes and goes
    lock = home.with_name(f"{home.name}.lock")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        guard = acquire_lock(lock)
        if guard is not None:
            home.mkdir(exist_ok=True)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{home}: cannot be written: {error.strerror}") from None
    if guard is None:
        raise OutputError(f"{out}: another run is writing it; wait for it, or stop it")
    try:
        # what is in the way is said before hours of work; what is not hashed now is hashed before it is removed
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


def _run_stage(plan: Plan, folder: Path, out: Path, **given: Any) -> Owned:
    """Make one stage, unless it lies there, made from the same and unchanged since."""
    from .output.ownership import STAGE_NOTE, survey
    from .record import fingerprint
    from .run import Interrupted, run_plan

    mark = fingerprint(plan, {"allow_nonfinite": given["allow_nonfinite"]})
    note = folder / STAGE_NOTE
    with contextlib.suppress(OSError, ValueError):
        if read_object(note) == {"fingerprint": mark, "files": _files(folder)}:
            return survey(folder, hashing=False)
    survey(folder).remove()
    try:
        run_plan(plan, folder, **given)
    except Interrupted:
        raise Interrupted(
            f"{out}: stopped while {plan.recipe.name!r} was made; run the same command again to continue"
        ) from None
    temporary = folder / f"{STAGE_NOTE}.new"
    temporary.write_text(json.dumps({"fingerprint": mark, "files": _files(folder)}), encoding="utf-8")
    temporary.rename(note)
    return survey(folder, hashing=False)


def _files(folder: Path) -> list[list[Any]]:
    """Return name, size and time of change of every file in a stage's folder."""
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


def _plan_one(recipe: Recipe, **options: Any) -> Plan:
    from .planner import build_plan

    if recipe.random_seed is not None:
        options.setdefault("seed", recipe.random_seed)
    return build_plan(recipe, **options)
