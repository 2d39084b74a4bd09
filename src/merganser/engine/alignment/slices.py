"""Align slices: stacked layers of several models."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...anatomy import Part
from ...errors import CheckpointError
from ...method import Location
from ...recipe import ModelReference, Recipe, layer_depth
from ...wording import some
from .alignment import (
    Alignment,
    Member,
    Slot,
    after_layers,
    check_names,
    inputs_of,
    is_recomputed,
    location_of,
    output_names,
)
from .stacking import check_outside, check_stack, donor_layer, odd_kinds, said_of_kinds


def align_slices(
    recipe: Recipe,
    slices: Sequence[Mapping[ModelReference, range]],
    donor: Member,
    members: Mapping[ModelReference, Member],
) -> Alignment:
    """Stack layers in the recipe's order; take tensors before and after them from the first and last slice.

    Args:
        recipe: A recipe with slices, whose ranges were checked.
        slices: For each slice, its models and their layers; all models of a slice have equally many layers.
        donor: Model that defines the names outside the layers.
        members: All inputs by reference.

    Raises:
        RecipeError: A model has no single stack of layers.
        CheckpointError: Tensors are missing or of different shapes, or the donor has no layer like one of the output.
    """
    used = [members[reference] for reference in dict.fromkeys(r for piece in slices for r in piece)]
    for member in dict.fromkeys([donor, *used]):
        check_stack(recipe, member)
    warnings: list[str] = []
    names, head, tied, drop = output_names(donor, used, warnings)
    if tied and head:
        # embedding and head may come from different slices, but a tied pair must stay one matrix
        drop[head] = "a copy of the embedding, to which the head is tied"
        names = [name for name in names if name != head]
    if tied and slices[0].keys() != slices[-1].keys():
        warnings.append(
            f"the models are tied, so the output's head is its embedding: that of {', '.join(map(str, slices[0]))}"
        )
    total = sum(len(next(iter(starts.values()))) for starts in slices)
    frame = _Frame(donor, used, names, drop, total)
    first, last = ({reference: members[reference] for reference in slices[index]} for index in (0, -1))
    slots = frame.slots("before", first, 0, 0.0)
    layers: list[int] = []
    odd: list[str | None] = []
    for index, starts in enumerate(slices):
        for step in range(len(next(iter(starts.values())))):
            made = list(_layer(members, starts, step, len(layers), total, index))
            slots += made
            # per-layer settings in the output's config come from the donor
            layer_numbers = starts.get(donor.reference) or next(iter(starts.values()))
            layers.append(donor_layer(donor, layer_numbers[step], made))
            sources = {reference: (members[reference], numbers[step]) for reference, numbers in starts.items()}
            odd.append(odd_kinds(len(layers) - 1, donor, layers[-1], sources))
    slots += frame.slots("after", last, len(slices) - 1, after_layers(recipe))
    warnings += said_of_kinds([each for each in odd if each])
    return Alignment(slots, tied, layers, warnings, reasons=drop)


@dataclass(frozen=True, slots=True)
class _Frame:
    """The tensors outside the layers.

    Prediction layers are numbered after the last layer, so tensors are matched by their names in the output.

    Args:
        donor: Model that defines the names.
        used: All models of the slices.
        names: Names of the tensors in the donor, or in the first model that has them.
        drop: Names that the output does not have.
        n_layers: Number of layers of the output.
    """

    donor: Member
    used: Sequence[Member]
    names: Sequence[str]
    drop: Collection[str]
    n_layers: int

    def slots(self, position: str, sources: Mapping[ModelReference, Member], slice_index: int, t: float) -> list[Slot]:
        """Return the slots of the tensors "before" or "after" the layers, made from the models of one slice."""
        names_by_model = {member.reference: self._held(member, position) for member in [self.donor, *self.used]}
        holders = {}
        for name in self.names:
            holder = next(member for member in [self.donor, *self.used] if name in member.anatomy.parts)
            if holder.anatomy.parts[name].position == position:
                holders[holder.anatomy.rename_behind(name, self.n_layers)] = (holder, name)
        for reference, member in sources.items():
            held = {new for new, old in names_by_model[reference].items() if old not in self.drop}
            check_names(self.donor, member, list(holders), held, names_by_model[reference])
        slots = []
        for new, (holder, name) in holders.items():
            inputs = inputs_of(new, [(member, names_by_model[r].get(new, name)) for r, member in sources.items()])
            check_outside(new, inputs, self.donor, names_by_model[self.donor.reference].get(new, name))
            part = replace(holder.anatomy.parts[name], name=new)
            slots.append(
                Slot(
                    name=new,
                    rule=new,
                    part=part,
                    slice_index=slice_index,
                    t=t,
                    location=location_of(name, holder.anatomy),
                    inputs=inputs,
                )
            )
        return slots

    def _held(self, member: Member, position: str) -> dict[str, str]:
        """Return the member's names of its tensors "before" or "after" the layers, by their names in the output."""
        anatomy = member.anatomy
        names = [name for name, part in anatomy.parts.items() if part.position == position]
        return {anatomy.rename_behind(name, self.n_layers): name for name in names}


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
        kept = {suffix: name for suffix, name in names.items() if suffix in common or not is_recomputed(name)}
        named[reference] = kept
    pattern = named[first]
    for reference, names in named.items():
        if names.keys() != pattern.keys():
            odd = sorted(names.keys() ^ pattern.keys())
            raise CheckpointError(
                f"layer {starts[reference][step]} of {reference} and layer {starts[first][step]} of {first} hold "
                f"different tensors: {some(odd)}"
            )
    for suffix, name in pattern.items():
        anatomy = members[first].anatomy
        new = anatomy.rename_layer(name, index)
        old = anatomy.parts[name]
        part = Part(new, old.stack, index, old.position, old.role, old.expert)
        location = Location(old.position, index, n_layers, old.role)
        sources = [(members[reference], names[suffix]) for reference, names in named.items()]
        yield Slot(
            name=new,
            rule=new,
            part=part,
            slice_index=slice_index,
            t=t,
            location=location,
            inputs=inputs_of(new, sources),
        )
