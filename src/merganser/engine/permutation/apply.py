"""Permute the models of a recipe to its reference: nothing is copied, their tensors are read in the new order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...anatomy.experts import EXPERTS, ExpertUnits
from ...anatomy.symmetry import UNITS, Units, find_units
from ...checkpoint.derived.permuted import permuted
from ...errors import CheckpointError, MergeError, RecipeError, UnsupportedError
from ...method import MergeMethod
from ...recipe import ModelReference, Recipe
from ...recipe.fields.align import Align
from ...statistics.correlations import Correlations, open_correlations
from ..alignment.alignment import Member
from ..plan.sections.permutation import Permutation, PermutedModel
from .activations import match_activations
from .assignment import Orders, nothing_moved
from .experts import experts_of, match_experts, moved_experts, with_experts
from .keep import Kept
from .match import indices, match_weights

__all__ = ["permute_members"]

_VERSION = 1
"""To be raised when the same models give other permutations, so that kept ones are not used."""

_MEASURED = ("reference", "model", "tokenizer", "parts")
"""What the run record repeats of correlations.json."""

Members = dict[ModelReference, Member]


def permute_members(
    recipe: Recipe,
    method: MergeMethod,
    members: Members,
    *,
    folder: Path | None,
    unmade: Collection[str],
    max_memory: int,
) -> tuple[Members, Permutation | None]:
    """Return the models of a recipe, permuted as its `align` says, and what was permuted.

    Args:
        recipe: The recipe.
        method: Its method.
        members: Its models.
        folder: Where permutations are kept until the merge is done; None to keep none.
        unmade: Paths of models that have no weights yet, as an earlier stage makes them; these stay as they are.
        max_memory: Largest memory for comparing the units of one group, bytes.

    Raises:
        RecipeError: The recipe's method or models cannot be aligned.
        CheckpointError: Two models have different shapes, or a tensor cannot be read.
        UnsupportedError: It is not known which permutations leave a model's output unchanged.
    """
    align = recipe.align
    if align is None:
        return members, None
    _check(recipe, method)
    reference = members[align.to]
    ours = _units(recipe, reference, align.units)
    experts = _experts(recipe, reference, align.units)
    result, found = dict(members), []
    for name, member in members.items():
        if member is reference:
            continue
        units = _units(recipe, member, align.units)
        own = _experts(recipe, member, align.units)
        _check_shapes(recipe, reference, ours, member, units)
        if {*name.paths, *align.to.paths} & set(unmade):
            found.append(PermutedModel(str(name), {}, ""))
            continue
        correlations = None
        if align.by == "activations":
            made = _correlations(recipe, align, name)
            if made is None:
                found.append(PermutedModel(str(name), {}, ""))
                continue
            correlations = open_correlations(made)
        kept = Kept(folder, _key(reference, member, align.units, correlations))
        given: dict[str, Any] = {"known": kept.orders, "found": kept.add, "max_memory": max_memory}
        try:
            placed = match_experts(reference.checkpoint.tensors, member.checkpoint.tensors, experts, own, kept)
            if correlations is None:
                orders = match_weights(reference.checkpoint.tensors, member.checkpoint.tensors, units, **given)
            else:
                orders = match_activations(correlations, units, **given)
        except MergeError as error:
            raise type(error)(f"{recipe.place_of('align')}: {name}: {error}") from None
        result[name] = with_experts(_permuted(member, units, orders), own, placed)
        moved = _moved(units, orders) | ({EXPERTS: moved_experts(own, placed)} if own else {})
        measured = None if correlations is None else {key: correlations.about[key] for key in _MEASURED}
        found.append(PermutedModel(str(name), moved, _digest(orders | placed), measured))
    return result, Permutation(str(align.to), align.by, tuple(found))


def _correlations(recipe: Recipe, align: Align, name: ModelReference) -> str | None:
    """Return the folder of a model's correlations with the reference; None if it will be made before the merge.

    Raises:
        RecipeError: Nothing makes it.
    """
    if align.correlations is None:
        raise RecipeError(
            f"{recipe.place_of('align')}: by: activations runs the models, which only a merge into a checkpoint does; align "
            "by weights here, or write the aligned merge first"
        )
    return align.correlations[str(name)]


def _check(recipe: Recipe, method: MergeMethod) -> None:
    place = recipe.place_of("align")
    if recipe.slices or recipe.modules:
        raise RecipeError(f"{place}: only whole models can be aligned; give 'models' in place of slices or modules")
    # within a merge, the models run as they are aligned
    if method.from_data and method.data_inputs == "own":
        raise RecipeError(
            f"{place}: the statistics from data that {method.name} takes are of the models as they are stored, so they do "
            "not fit aligned ones; write the aligned models first, or use a method without statistics"
        )
    if method.sidecar is not None:
        raise RecipeError(
            f"{place}: {method.name} stores what restores each model, and would restore it in another order; leave "
            "'align' out"
        )


def _experts(recipe: Recipe, member: Member, kinds: Sequence[str]) -> list[ExpertUnits]:
    if EXPERTS not in kinds:
        return []
    try:
        return experts_of(member)
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{recipe.place_of('align')}: {member.reference}: {error}") from None


def _units(recipe: Recipe, member: Member, kinds: Sequence[str]) -> list[Units]:
    if set(kinds) <= {EXPERTS}:
        return []
    shapes = {name: tensor.shape for name, tensor in member.checkpoint.tensors.items()}
    try:
        found = find_units(shapes, member.checkpoint.config, member.anatomy)
    except UnsupportedError as error:
        raise UnsupportedError(f"{recipe.place_of('align')}: {member.reference}: {error}") from None
    return [units for units in found if units.kind in kinds]


def _check_shapes(recipe: Recipe, first: Member, ours: list[Units], other: Member, theirs: list[Units]) -> None:
    """Refuse models whose units are not the same, or lie elsewhere in a tensor that both have."""
    tensors, held = other.checkpoint.tensors, first.checkpoint.tensors
    for name in dict.fromkeys(use.tensor for each in theirs for one in (each, each.inner) if one for use in one.uses):
        if name in held and tensors[name].shape != held[name].shape:
            raise CheckpointError(
                f"{recipe.place_of('align')}: {name}: shapes differ: {list(held[name].shape)} in {first.reference}, "
                f"{list(tensors[name].shape)} in {other.reference}; only models of one shape can be aligned"
            )
    sizes = [{(each.name, each.size, each.inner and each.inner.size) for each in units} for units in (ours, theirs)]
    if sizes[0] != sizes[1]:
        names = sorted(str(name) for name, *_ in sizes[0] ^ sizes[1])
        raise CheckpointError(
            f"{recipe.place_of('align')}: {names[0]}: {first.reference} and {other.reference} have different units here, so "
            "they cannot be aligned"
        )


def _permuted(member: Member, units: Sequence[Units], orders: Orders) -> Member:
    tensors = dict(member.checkpoint.tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name, axes in indices(units, orders, shapes).items():
        tensors[name] = permuted(tensors[name], axes)
    return replace(member, checkpoint=replace(member.checkpoint, tensors=tensors))


def _moved(units: Sequence[Units], orders: Orders) -> dict[str, tuple[int, int]]:
    """Return how many units change their place, of how many, by kind; of grouped queries the heads are counted."""
    still = nothing_moved(units)
    found: dict[str, tuple[int, int]] = {}
    for group in units:
        one = group.inner or group
        count, total = found.get(group.kind, (0, 0))
        moved = int((orders[one.name] != still[one.name]).sum())
        found[group.kind] = (count + moved, total + one.size)
    return {kind: found[kind] for kind in UNITS if kind in found}


def _digest(orders: Orders) -> str:
    found = hashlib.sha256()
    for name, order in sorted(orders.items()):
        found.update(f"{name} {len(order)}\n".encode() + order.astype("<i8").tobytes())
    return found.hexdigest()


def _key(reference: Member, member: Member, kinds: Sequence[str], correlations: Correlations | None) -> str:
    """Return a hash of everything that decides a permutation."""
    facts: list[object] = [_VERSION, np.__version__, list(kinds), correlations and correlations.hash]
    for each in (reference, member):
        states = [(str(file), (s := file.stat()).st_size, s.st_mtime_ns) for file in _files(each)]
        facts.append([each.checkpoint.reference, states])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _files(member: Member) -> Mapping[Path, None]:
    return dict.fromkeys([*member.checkpoint.weight_files, *member.checkpoint.adapter])
