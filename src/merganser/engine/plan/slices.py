"""Align slices: layers of several models, stacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ...anatomy import Part
from ...errors import CheckpointError, RecipeError
from ...method import Location
from ...recipe import ModelReference, Recipe, layer_depth
from .alignment import (
    _RECOMPUTED,
    Alignment,
    Member,
    Slot,
    _anatomy,
    _check_names,
    _inputs,
    _names,
    _part,
    _some,
    after_layers,
    location_of,
)


def align_slices(
    recipe: Recipe,
    slices: Sequence[Mapping[ModelReference, range]],
    donor: Member,
    members: Mapping[ModelReference, Member],
) -> Alignment:
    """Align slices: layers are stacked in the order of the recipe, the rest comes from the first and last slice.

    Args:
        recipe: A recipe with slices, whose ranges were checked.
        slices: For each slice, its models and their layers; all of a slice have equally many.
        donor: Gives the names outside the layers.
        members: All inputs by reference.

    Raises:
        RecipeError: A model has no single stack of layers.
        CheckpointError: Tensors are missing or of different shapes.
    """
    used = [members[reference] for reference in dict.fromkeys(r for piece in slices for r in piece)]
    for member in used:
        if member.anatomy.main is None:
            raise RecipeError(
                f"{recipe.place}: {member.reference} has no single stack of numbered layers, so it cannot be sliced"
            )
    warnings: list[str] = []
    names, head, tied, drop = _names(donor, used, warnings)
    if tied and head:
        # embedding and head may come from different slices; what was tied stays one matrix
        drop.add(head)
        names = [name for name in names if name != head]
    if tied and slices[0].keys() != slices[-1].keys():
        warnings.append(
            f"the models are tied, so the output's head is its embedding: that of {', '.join(map(str, slices[0]))}"
        )
    slots: list[Slot] = []
    layers: list[int] = []

    def outside(position: str, index: int, t: float) -> None:
        sources = {reference: members[reference] for reference in slices[index]}
        parts = {name: _part(name, [donor, *used]) for name in names}
        wheres = {name: location_of(name, _anatomy(name, [donor, *used])) for name in names}
        found = [name for name in names if parts[name].position == position]
        for member in sources.values():
            own = (name for name, part in member.anatomy.parts.items() if part.position == position)
            _check_names(donor, member, found, set(own) - drop)
        for name in found:
            inputs = _inputs(name, {reference: (member, name) for reference, member in sources.items()})
            slots.append(Slot(name, name, parts[name], index, t, wheres[name], inputs))

    outside("before", 0, 0.0)
    total = sum(len(next(iter(starts.values()))) for starts in slices)
    for index, starts in enumerate(slices):
        # per-layer settings in the config are the donor's
        own = starts.get(donor.reference) or next(iter(starts.values()))
        for step in range(len(own)):
            slots += _layer(members, starts, step, len(layers), total, index)
            layers.append(min(own[step], donor.anatomy.n_layers - 1))
    outside("after", len(slices) - 1, after_layers(recipe))
    return Alignment(slots, tied, layers, warnings)


def _layer(
    members: Mapping[ModelReference, Member],
    starts: Mapping[ModelReference, range],
    step: int,
    index: int,
    n_layers: int,
    slice_index: int,
) -> Iterable[Slot]:
    """Yield the slots of one layer of the output."""
    first = next(iter(starts))
    t = layer_depth(step, len(starts[first]))
    named = {reference: members[reference].layers[layers[step]] for reference, layers in starts.items()}
    common = set.intersection(*(set(names) for names in named.values()))
    for reference, names in named.items():
        kept = {suffix: name for suffix, name in names.items() if suffix in common or not _RECOMPUTED.search(name)}
        named[reference] = kept
    pattern = named[first]
    for reference, names in named.items():
        if names.keys() != pattern.keys():
            odd = sorted(names.keys() ^ pattern.keys())
            raise CheckpointError(
                f"layer {starts[reference][step]} of {reference} and layer {starts[first][step]} of {first} hold "
                f"different tensors: {_some(odd)}"
            )
    for suffix, name in pattern.items():
        anatomy = members[first].anatomy
        new = anatomy.rename_layer(name, index)
        old = anatomy.parts[name]
        part = Part(new, old.stack, index, old.position, old.role, old.expert)
        location = Location(old.position, index, n_layers, old.role)
        sources = {reference: (members[reference], names[suffix]) for reference, names in named.items()}
        yield Slot(new, new, part, slice_index, t, location, _inputs(new, sources))
