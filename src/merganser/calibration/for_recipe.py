"""Make the statistics that a recipe's method needs from the data that the recipe names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import MergeError, OutputError, RecipeError
from ..method import MergeMethod
from ..recipe import Inputs, Recipe, Source, check_recipe
from ..recipe.data import Data
from ..recipe.place import Place
from ..statistics import STATISTICS_NAME, CalibrationPlan, Statistics, open_statistics
from .plan import lay_out, plan_prepared
from .preparation import Prepared, prepare
from .run import Progress, run_prepared
from .within.pairs import CROSS_GRAM

__all__ = [
    "Wanted",
    "check_same",
    "make_statistics",
    "plan_statistics",
    "prepared_for",
    "wanted_by",
    "with_statistics",
]

_UNUSUAL = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Statistics of one model that a recipe asks for.

    Args:
        name: Name of their folder.
        model: The model, as the recipe writes it.
        data: On what it is calibrated.
        statistics: What is summed.
        place: Where the recipe names the model.
        inputs: What computes the inputs, as in `FromData`. If not the model itself, all models of the recipe are
            measured together, and the name of the folder has two parts, the first of which they share.
    """

    name: str
    model: str
    data: Data
    statistics: tuple[str, ...]
    place: Place
    inputs: str = "own"


def wanted_by(recipe: Recipe, *, taken: Collection[str] = ()) -> list[Wanted]:
    """Return the statistics that must be made before a recipe can be merged.

    Args:
        recipe: The recipe.
        taken: Names of folders that other recipes of the same file use.

    Raises:
        RecipeError: The recipe names data, and its method or its models need none; or it is invalid otherwise.
    """
    if not recipe.names_data:
        return []
    resolver = check_recipe(recipe)
    method = resolver.method
    if method.needs_gradients:
        raise RecipeError(
            f"{recipe.place}: {method.name} uses gradients or losses, which are not measured within a merge; write them "
            "with merganser calibrate, and give the folders as 'statistics' in place of 'data'"
        )
    merged = [source for i in range(len(resolver.slices)) for source in _measured(method, resolver.sources(i))]
    places = {source.place for source in merged}
    for source in _sources(recipe):
        if source.data is not None and source.data.own and (not method.from_data or source.place not in places):
            of = "of the base" if source.model == recipe.base_model else "of this model"
            of = of if method.from_data else "from data"
            raise RecipeError(f"{source.data.place}: {method.name} uses no statistics {of}; leave the key out")
    statistics = tuple(dict.fromkeys(own.statistic for own in method.from_data.values()))
    found: dict[tuple[str, Data], Wanted] = {}
    group = "" if method.data_inputs == "own" else _group(taken)
    for source in merged if method.from_data else ():
        if source.data is None:
            continue
        # the same model and data give the same statistics, wherever the recipe writes them
        key = str(source.model), _anywhere(source.data)
        if key not in found:
            name = _name(source, [*taken, *(each.name.removeprefix(group) for each in found.values())])
            found[key] = Wanted(group + name, key[0], source.data, statistics, source.place, method.data_inputs)
    for unused in ("data", "keep_statistics"):
        if unused in recipe.places and not found:
            reason = (
                "every model has statistics already"
                if method.from_data
                else f"{method.name} uses no statistics from data"
            )
            raise RecipeError(f"{recipe.place_of(unused)}: {reason}; leave the key out")
    return list(found.values())


def _measured(method: MergeMethod, inputs: Inputs) -> Sequence[Source]:
    """Return what a method takes statistics of."""
    if method.data_of == "base":
        return [] if inputs.base is None else [inputs.base]
    return inputs.models if method.data_of == "models" else inputs.models[:1]


def _group(taken: Collection[str]) -> str:
    """Return the first part, with a slash, of the names of folders of models that are measured within one merge."""
    number = 1
    while any(name.startswith(f"within-{number}/") for name in taken):
        number += 1
    return f"within-{number}/"


def with_statistics(recipe: Recipe, folders: Mapping[Wanted, Path]) -> Recipe:
    """Return the recipe with statistics in place of data.

    Args:
        recipe: The recipe.
        folders: The folders of all statistics that `wanted_by` returns.
    """
    plain = {(each.model, _anywhere(each.data)): path for each, path in folders.items()}

    def source(each: Source) -> Source:
        path = None if each.data is None else plain.get((str(each.model), _anywhere(each.data)))
        return replace(each, statistics=each.statistics if path is None else str(path), data=None)

    return replace(
        recipe,
        models=tuple(source(each) for each in recipe.models),
        slices=tuple(replace(piece, sources=tuple(source(s) for s in piece.sources)) for piece in recipe.slices),
    )


def plan_statistics(wanted: Wanted, folder: Path, kept: Path | None, cache_dir: Path | None) -> CalibrationPlan:
    """Plan a calibration, and lay out its statistics without values, for planning the merge.

    Args:
        wanted: What is to be made.
        folder: The folder to write, which must not exist.
        kept: Where the statistics will be; None where that is temporary.
        cache_dir: Folder for models from the Hub.

    Raises:
        MergeError: The data or the model cannot be used; the message begins with the place in the recipe.
    """
    with prepared_for(wanted, cache_dir) as prepared:
        plan, blocks = plan_prepared(prepared, wanted.model, wanted.name, wanted.inputs)
        lay_out(prepared, blocks, folder, wanted.inputs)
        present = kept is not None and (kept / STATISTICS_NAME).exists()
        if present and kept is not None:
            check_same(open_statistics(kept), prepared, kept, hashing=False)
        return replace(plan, present=present)


def make_statistics(
    wanted: Wanted, folder: Path, *, kept: bool, cache_dir: Path | None, progress: Progress | None
) -> Statistics:
    """Calibrate a model, unless the statistics are there; an interrupted calibration continues.

    Args:
        wanted: What is to be made.
        folder: The folder for them.
        kept: Whether the folder is the user's: other statistics in it are refused, and replaced otherwise.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of finished blocks and of all blocks.

    Raises:
        MergeError: They cannot be made; the message begins with the place in the recipe.
    """
    with prepared_for(wanted, cache_dir) as prepared:
        if (folder / STATISTICS_NAME).exists():
            present = open_statistics(folder)
            try:
                check_same(present, prepared, folder, hashing=True)
                return present
            except OutputError:
                if kept:
                    raise
            for name in (STATISTICS_NAME, *present.about["files"]):
                (folder / name).unlink()
        return run_prepared(prepared, folder, progress)


@contextmanager
def prepared_for(wanted: Wanted, cache_dir: Path | None) -> Iterator[Prepared]:
    """Prepare a calibration; errors begin with the place in the recipe."""
    data = wanted.data
    try:
        with prepare(
            wanted.model,
            data.source,
            statistics=[name for name in wanted.statistics if name != CROSS_GRAM],
            choice=data.choice,
            batch_tokens=data.batch_tokens,
            cache_dir=cache_dir,
        ) as prepared:
            yield prepared
    except MergeError as error:
        raise type(error)(f"{wanted.place}: data: {error}") from None


def check_same(present: Statistics, prepared: Prepared, folder: Path, *, hashing: bool) -> None:
    """Check that statistics are those that would be made.

    Raises:
        OutputError: They are of another model, or of other data.
    """
    about = prepared.about(hashing=hashing)
    other = {
        "of other weights": hashing and present.about["model"]["hash"] != about["model"]["hash"],
        "of another tokenizer": present.about["tokenizer"] != about["tokenizer"],
        "of other data, or other sequences of them": present.about["parts"] != about["parts"],
        "of other kinds": not set(prepared.statistics) <= set(present.statistics),
    }
    found = next((reason for reason, differs in other.items() if differs), None)
    if found is not None:
        raise OutputError(
            f"{folder}: the statistics there are {found} than the recipe's; remove them, or keep these in another folder"
        )


def _anywhere(data: Data) -> Data:
    """Return data without the place where the recipe says them."""
    return replace(data, place=Place("", 0, ""), own=False)


def _sources(recipe: Recipe) -> Sequence[Source]:
    return [*recipe.models, *(source for piece in recipe.slices for source in piece.sources)]


def _name(source: Source, taken: Collection[str]) -> str:
    """Return a name for a model's folder: its own, or the last part of its path, with a number where that is taken."""
    whole = source.name or Path(source.model.path).expanduser().name or "model"
    name = _UNUSUAL.sub("-", whole).strip(".-") or "model"
    number = 1
    while (name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return name if number == 1 else f"{name}-{number}"
