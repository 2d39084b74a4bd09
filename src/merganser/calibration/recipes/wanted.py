"""The statistics that must be made before a recipe can be merged, from the data that it names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ...method import MergeMethod
from ...recipe import Inputs, ModelReference, Recipe, Resolver, Slice, Source, check_recipe
from ...recipe.document.place import Place
from ...recipe.fields.data import Data
from ...statistics import LOSS
from ...statistics.choice import LABELS
from ..learning import Descent, descent_of
from ..planning.mode import ALONE, Mode
from ..reverse import GRADIENTS

__all__ = ["Wanted", "folder_name", "free_name", "wanted_by", "with_statistics"]

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
        of_base: Whether they are of the base on a model's data; `model` is the base.
        mode: How they are measured. If together with those of other models, the name of the folder has two parts, the first
            of which they share.
    """

    name: str
    model: str
    data: Data
    statistics: tuple[str, ...]
    place: Place
    of_base: bool = False
    mode: Mode = ALONE


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
    pairs = [pair for i in range(len(resolver.slices)) for pair in _measured(method, resolver.sources(i))]
    _check_used(recipe, method, pairs)
    found: dict[tuple[str, Data, bool], Wanted] = {}
    group = "" if method.data_inputs == "own" else _group(taken)
    for model, source, for_base in pairs:
        if source.data is None or (for_base and source.base_statistics is not None):
            continue
        # the same model and data give the same statistics, wherever the recipe writes them
        key = str(model.model), _anywhere(source.data), for_base
        if key not in found:
            used = [*taken, *(each.name.removeprefix(group) for each in found.values())]
            name = free_name(f"base-on-{_name(source)}" if for_base else _name(source), used)
            statistics = method.data_statistics(of_base=for_base)
            found[key] = Wanted(group + name, key[0], source.data, statistics, source.place, for_base)
    aligned = recipe.align is not None and recipe.align.data is not None
    for unused in ("data", "keep_statistics"):
        if unused in recipe.places and not found and not aligned:
            reason = "every model has statistics already" if pairs else f"{method.name} uses no statistics from data"
            raise RecipeError(f"{recipe.place_of(unused)}: {reason}; leave the key out")
    _check_labels(method, list(found.values()))
    mode = _mode(resolver, len(found)) if found else ALONE
    return [replace(each, mode=mode) for each in found.values()]


def _mode(resolver: Resolver, models: int) -> Mode:
    """Return how the statistics of the recipe's method are measured, of so many models."""
    inputs = resolver.method.data_inputs
    if inputs == "own":
        return ALONE
    fitted = _parameters(resolver) if inputs == "fitted" else {"steps": 0, "batch": 0}
    return Mode(inputs, models, _descent(resolver), int(fitted["steps"]), int(fitted["batch"]))


def _parameters(resolver: Resolver) -> Mapping[str, Any]:
    """Return the parameters that all tensors share."""
    return resolver.parameters(0, "", [""] * len(resolver.sources(0).models), 0.0)


def _descent(resolver: Resolver) -> Descent | None:
    """Return the steps in which the method learns coefficients, which all tensors share; None if it learns none."""
    if resolver.method.data_inputs != "end_to_end":
        return None
    return descent_of(resolver.method, _parameters(resolver))


def _check_used(recipe: Recipe, method: MergeMethod, pairs: Sequence[tuple[Source, Source, bool]]) -> None:
    """Check that the data that a recipe says for one model alone are used.

    Raises:
        RecipeError: They are not.
    """
    used = {source.place for _, source, for_base in pairs if not (for_base and source.base_statistics is not None)}
    for source in _sources(recipe):
        if source.data is None or not source.data.own or source.place in used:
            continue
        if source.base_statistics is not None:
            raise RecipeError(f"{source.data.place}: {method.name} takes 'base_statistics' alone; leave the data out")
        of = "of the base" if source.model == recipe.base_model else "of this model"
        raise RecipeError(
            f"{source.data.place}: {method.name} uses no statistics {of if pairs else 'from data'}; leave the key out"
        )


def _check_labels(method: MergeMethod, wanted: Sequence[Wanted]) -> None:
    """Refuse `labels` if no gradient is measured, and those that are sampled if the method compares losses.

    Raises:
        RecipeError: They are said.
    """
    for each in wanted:
        if each.data.labels is None or set(each.statistics) & {*GRADIENTS}:
            continue
        if LOSS not in each.statistics:
            raise RecipeError(
                f"{each.data.place}: labels: {method.name} uses no gradients of a loss; leave the key out"
            )
        if each.data.labels != LABELS[0]:
            raise RecipeError(
                f"{each.data.place}: labels: {method.name} compares losses on the data; the loss on tokens that a model "
                "draws itself says nothing of the data. Leave the key out"
            )


def _measured(method: MergeMethod, inputs: Inputs) -> list[tuple[Source, Source, bool]]:
    """Return what a method takes statistics of: each model, the source whose data it runs on, and if it is the base."""
    bases = () if inputs.base is None else (inputs.base,)
    sources = method.data_sources(bases, inputs.models)
    found = [(source, source, False) for source in sources] if method.data_statistics() else []
    of_base = method.data_statistics(of_base=True)
    return found + [(base, source, True) for base in bases for source in sources if of_base]


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
    made = {(each.model, _anywhere(each.data), each.of_base): str(path) for each, path in folders.items()}

    def source(each: Source, base: ModelReference | None) -> Source:
        if each.data is None:
            return each
        data = _anywhere(each.data)
        own = made.get((str(each.model), data, False))
        of_base = each.base_statistics or made.get((str(base), data, True))
        return replace(each, statistics=each.statistics or own, base_statistics=of_base, data=None)

    def piece(each: Slice) -> Slice:
        base = each.base_model or recipe.base_model
        return replace(each, sources=tuple(source(own, base) for own in each.sources))

    return replace(
        recipe,
        models=tuple(source(each, recipe.base_model) for each in recipe.models),
        slices=tuple(map(piece, recipe.slices)),
    )


def _anywhere(data: Data) -> Data:
    """Return data without the place where the recipe says them."""
    return replace(data, place=Place("", 0, ""), own=False)


def _sources(recipe: Recipe) -> Sequence[Source]:
    return [*recipe.models, *(source for piece in recipe.slices for source in piece.sources)]


def _name(source: Source) -> str:
    """Return a name for a model's folder: its own, or the last part of its path."""
    return folder_name(source.name or source.model.path)


def folder_name(path: str) -> str:
    """Return a name for the folder of a model: the last part of its path, without unusual characters."""
    return _UNUSUAL.sub("-", Path(path).expanduser().name).strip(".-") or "model"


def free_name(name: str, taken: Collection[str]) -> str:
    """Return a name, with a number where it is taken."""
    number = 1
    while (name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return name if number == 1 else f"{name}-{number}"
