"""Align models module by module: language model, towers, projector; or encoder and decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...anatomy.modules import TEXT, find_modules, language_root, module_name
from ...checkpoint import matched
from ...errors import CheckpointError, RecipeError, did_you_mean
from ...recipe import Inputs, ModelReference, Recipe, check_layer_ranges
from ...wording import plural
from .alignment import Alignment, Member, Slot, location_of
from .slices import align_slices
from .whole_models import align_models

__all__ = ["align_modules", "as_language_parts", "differ_in_modules"]


def as_language_parts(members: Mapping[ModelReference, Member]) -> tuple[dict[ModelReference, Member], list[str]]:
    """Return the models with the first one's names for the tensors of their language model, where one has towers.

    The language model of a larger model has the same tensors as a model of text, behind another prefix:
    "model.language_model." or "language_model.model." for "model.".

    Args:
        members: The models; the first one gives the names.

    Returns:
        The models, and a message about each that has other names.
    """
    donor, *others = members.values()
    mine, found, messages = find_modules(donor.anatomy), dict(members), []
    root = language_root(donor.anatomy)
    for member in others:
        if member.anatomy is donor.anatomy:
            continue
        theirs = find_modules(member.anatomy)
        own = language_root(member.anatomy)
        if own == root or TEXT not in mine or TEXT not in theirs or (len(mine) == 1 and len(theirs) == 1):
            continue
        names = _renamed(theirs[TEXT], own, mine[TEXT], root)
        taken = set(member.checkpoint.tensors) - set(names)
        if len(set(names.values())) < len(names) or taken & set(names.values()):
            continue
        tensors = {}
        for name, tensor in member.checkpoint.tensors.items():
            new = names.get(name, name)
            tensors[new] = matched(tensor, new)
        found[member.reference] = Member.of(member.reference, replace(member.checkpoint, tensors=tensors))
        messages.append(
            f"{member.reference}: its language model is matched with that of {donor.reference}: {own or 'no prefix'} is "
            f"{root or 'no prefix'} there"
        )
    return found, messages


def _renamed(names: Sequence[str], own: str, others: Sequence[str], root: str) -> dict[str, str]:
    """Return the donor's names for the tensors of a language model.

    Args:
        names: The names.
        own: Prefix of the module with the layers.
        others: The donor's names.
        root: The donor's prefix.
    """
    # heads are outside: "lm_head.weight", in some models behind the prefix of the language model with its head
    outside = {_last(name): name for name in others if not name.startswith(root)}
    head = root.removesuffix("model.") if root.endswith(".model.") else ""
    found = {}
    for name in names:
        inside = name.startswith(own) and not (own == "" and _last(name) in outside)
        found[name] = root + name.removeprefix(own) if inside else outside.get(_last(name), head + _last(name))
    return found


def _last(name: str) -> str:
    """Return the last two words of a name: "lm_head.weight"."""
    return ".".join(name.rsplit(".", 2)[-2:])


def differ_in_modules(members: Sequence[Member]) -> bool:
    """Return whether some of the models are the language model, or another module, of others."""
    distinct = {id(member.anatomy): member.anatomy for member in members}
    return len(distinct) > 1 and len({frozenset(find_modules(anatomy)) for anatomy in distinct.values()}) > 1


def align_modules(
    recipe: Recipe, given: Sequence[Inputs], donor: Member, members: Mapping[ModelReference, Member]
) -> Alignment:
    """Align each module by itself; what no model is merged into is copied from the donor.

    Args:
        recipe: A recipe with modules; or with models that do not all have the same modules, of which those are merged
            that all have.
        given: The inputs of each slice.
        donor: Model whose names and config the output gets.
        members: All inputs by reference.

    Raises:
        RecipeError: The donor has no such module, or it is named twice.
        CheckpointError: A model lacks the module, or tensors do not match.
    """
    whole = find_modules(donor.anatomy)
    wanted = _wanted(recipe, whole, donor, members)
    made: dict[str, Alignment] = {}
    for name, (slices, sliced) in wanted.items():
        inputs = [given[i] for i in slices]
        made[name] = _align_one(recipe, name, inputs, slices.start, sliced, donor, members)
    return _Joined(donor, members, whole, made).alignment(recipe)


def _wanted(
    recipe: Recipe, whole: Mapping[str, Sequence[str]], donor: Member, members: Mapping[ModelReference, Member]
) -> dict[str, tuple[range, bool]]:
    """Return the slices of each module that is merged, and whether they have ranges of layers."""
    if not recipe.modules:
        theirs = [set(find_modules(member.anatomy)) for member in members.values()]
        common = [name for name in whole if all(name in each for each in theirs)]
        if not common:
            listed = "; ".join(f"{r} has {', '.join(find_modules(m.anatomy))}" for r, m in members.items())
            raise CheckpointError(f"{recipe.place}: the models have no module in common: {listed}")
        return {name: (range(1), False) for name in common}
    wanted: dict[str, tuple[range, bool]] = {}
    places: dict[str, str] = {}
    for module in recipe.modules:
        name = module_name(module.name, whole, donor.anatomy)
        if name is None:
            hint = did_you_mean(module.name, whole)
            raise RecipeError(
                f"{module.place}: {donor.reference}, whose config the output gets, has no module {module.name!r}.{hint} "
                f"Its modules: {', '.join(whole)}"
            )
        if name in wanted:
            raise RecipeError(f"{module.place}: this is the module {name}, which is already given at {places[name]}")
        wanted[name], places[name] = (module.slices, not module.whole), str(module.place)
    return wanted


def _align_one(
    recipe: Recipe,
    name: str,
    inputs: Sequence[Inputs],
    start: int,
    sliced: bool,
    donor: Member,
    members: Mapping[ModelReference, Member],
) -> Alignment:
    """Align one module."""
    listed = [(*each.models, *([each.base] if each.base else [])) for each in inputs]
    used = dict.fromkeys(source.model for each in listed for source in each)
    parts = {reference: _part_of(members[reference], name, recipe) for reference in (donor.reference, *used)}
    own = parts[donor.reference]
    if not sliced:
        alignment = align_models(recipe, own, [parts[reference] for reference in used])
    else:
        pieces = [recipe.slices[start + i] for i in range(len(inputs))]
        counts = {r: member.anatomy.n_layers for r, member in parts.items() if member.anatomy.main}
        check_layer_ranges(replace(recipe, slices=tuple(pieces)), counts)
        ranges = [{s.model: range(*s.layer_range) for s in each if s.layer_range} for each in listed]
        alignment = align_slices(recipe, ranges, own, parts)
    slots = [replace(slot, slice_index=slot.slice_index + start) for slot in alignment.slots]
    return replace(alignment, slots=slots)


def _part_of(member: Member, name: str, recipe: Recipe) -> Member:
    """Return one module of a model as a model.

    Raises:
        CheckpointError: The model has no such module.
    """
    modules = find_modules(member.anatomy)
    if name not in modules:
        raise CheckpointError(
            f"{recipe.place_of_model(member.reference)}: {member.reference} has no module {name}; it has "
            f"{', '.join(modules)}"
        )
    if len(modules) == 1:
        return member
    tensors = {each: member.checkpoint.tensors[each] for each in modules[name]}
    part = Member.of(member.reference, replace(member.checkpoint, tensors=tensors))
    return replace(part, tied=member.tied and member.anatomy.embedding in tensors)


@dataclass(frozen=True, slots=True)
class _Joined:
    """The alignments of all modules, to be put together.

    Args:
        donor: Model from which the other modules are copied.
        members: All inputs by reference.
        whole: The donor's tensors by module.
        made: The alignment of each module that is merged.
    """

    donor: Member
    members: Mapping[ModelReference, Member]
    whole: Mapping[str, Sequence[str]]
    made: Mapping[str, Alignment]

    def alignment(self, recipe: Recipe) -> Alignment:
        """Return the alignment of the whole model."""
        slots: list[Slot] = []
        warnings = [warning for each in self.made.values() for warning in each.warnings]
        for module, names in self.whole.items():
            if module in self.made:
                slots += self.made[module].slots
            else:
                slots += [self._kept(name) for name in names]
                warnings.append(self._said_of_kept(module, names, recipe))
        layers = {module: each.layers for module, each in self.made.items() if each.layers is not None}
        main = layers.pop(TEXT, None)
        return Alignment(
            slots=slots,
            tied=self._tied(),
            layers=main,
            warnings=warnings + self._said_of_others(),
            left_out=frozenset(name for each in self.made.values() for name in each.left_out),
            reasons={name: why for each in self.made.values() for name, why in each.reasons.items()},
            other_layers=layers,
            modules={module: self._models_of(module) for module in self.whole},
            partial=frozenset(
                r for r, m in self.members.items() if find_modules(m.anatomy).keys() != self.whole.keys()
            ),
        )

    def _tied(self) -> bool:
        for module, each in self.made.items():
            if self.donor.anatomy.embedding in self.whole[module]:
                return each.tied
        return self.donor.tied

    def _kept(self, name: str) -> Slot:
        anatomy = self.donor.anatomy
        inputs = {self.donor.reference: self.donor.checkpoint.tensors[name]}
        return Slot(
            name=name,
            rule=name,
            part=anatomy.parts[name],
            slice_index=0,
            t=0.0,
            location=location_of(name, anatomy),
            inputs=inputs,
            kept=True,
        )

    def _said_of_kept(self, module: str, names: Sequence[str], recipe: Recipe) -> str:
        others = [str(r) for r, m in self.members.items() if m is not self.donor and module in find_modules(m.anatomy)]
        said = f"{module} ({plural(len(names), 'tensor')}): copied from {self.donor.reference}"
        if recipe.modules:
            return f"{said}: the recipe merges nothing into it"
        return f"{said}" + (
            f"; 'modules' in the recipe can merge that of {', '.join(others)} into it" if others else ""
        )

    def _models_of(self, module: str) -> frozenset[ModelReference]:
        alignment = self.made.get(module)
        if alignment is None:
            return frozenset([self.donor.reference])
        return frozenset(reference for slot in alignment.slots for reference in slot.inputs)

    def _said_of_others(self) -> list[str]:
        """Return which modules of the other models are left out, since the output has none of their name."""
        said = []
        for reference, member in self.members.items():
            left = {name: each for name, each in find_modules(member.anatomy).items() if name not in self.whole}
            if left:
                counts = ", ".join(f"{name} ({plural(len(names), 'tensor')})" for name, names in left.items())
                said.append(f"{reference}: left out, since {self.donor.reference} has no such module: {counts}")
        return said
