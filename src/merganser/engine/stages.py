"""The stages of a recipe of several documents: which of them run, in which order, and where their outputs are kept.

The outputs of the stages lie in the folder `.OUT.stages` next to the target, each under the name of its document. A
finished stage is reused as long as nothing that it was merged from has changed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.hub import is_hub_id
from ..errors import MergeError, OutputError, RecipeError, UnreachableError
from ..jsonfile import exists, read_object
from ..recipe import ModelReference, Recipe, Slice, Source
from .either import run_either

if TYPE_CHECKING:
    from .adapters.plan import AdapterPlan
    from .output.ownership import Owned
    from .plan.plan import Plan


def stages_folder(out: str | Path) -> Path:
    """Return the folder next to a target that holds the outputs of its other stages."""
    return Path(out).with_name(f".{Path(out).name}.stages")


def needed_stages(recipes: Sequence[Recipe], keep_stages: bool) -> list[Recipe]:
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


def with_folders(recipe: Recipe, folders: Mapping[str, Path]) -> Recipe:
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


def folder_name(name: str) -> str:
    """Return the folder name of a stage; different stages have different names."""
    return name.replace("%", "%25").replace("/", "%2F").replace("\\", "%5C")


@dataclass(frozen=True, slots=True)
class Stages:
    """The outputs of the stages.

    Args:
        home: The folder that holds them.
        made: Those that this run wrote or reused, by the name of their folder.
    """

    home: Path
    made: dict[str, Owned]

    def remove(self) -> None:
        """Remove the folder, unless it holds anything that merganser did not write."""
        from .output.leftovers import discard
        from .output.ownership import survey_each

        discard(self.home, partial(survey_each, known=self.made))


@contextlib.contextmanager
def made_stages(out: Path, *, keep: bool, fresh: bool) -> Iterator[Stages]:
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
        stages = Stages(home, {})
        try:
            yield stages
        except MergeError as error:
            if not keep and not isinstance(error, OutputError | UnreachableError):
                stages.remove()
            raise
        if not keep:
            stages.remove()
    finally:
        guard.release()


def run_stage(plan: Plan | AdapterPlan, folder: Path, out: Path, **given: Any) -> Owned:
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
