"""Check that stacked layers have the names and shapes of the donor's, whose config the output gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...anatomy.settings.config import text_scopes
from ...anatomy.settings.kinds import implied_lists
from ...checkpoint import TensorInfo
from ...errors import CheckpointError, RecipeError
from ...recipe import ModelReference, Recipe
from ...wording import plural
from .alignment import Member, Slot, is_recomputed

__all__ = ["check_outside", "check_stack", "donor_layer", "odd_kinds", "said_of_kinds"]

Shape = tuple[int, ...]

_KINDS = ("layer_types", "layers_block_type", "attention_layers", "block_types")
"""Keys under which configs list the kind of each layer."""


def check_stack(recipe: Recipe, member: Member) -> None:
    """Refuse a model that has no single stack of layers.

    Raises:
        RecipeError: It has none, or several.
    """
    anatomy = member.anatomy
    if anatomy.main is not None:
        return
    if not anatomy.stacks:
        raise RecipeError(f"{recipe.place}: {member.reference} has no numbered layers, so it cannot be sliced")
    stacks = ", ".join(f"{prefix} ({count} layers)" for prefix, count in anatomy.stacks.items())
    raise RecipeError(
        f"{recipe.place}: {member.reference} has several stacks of layers, {stacks}, so a layer_range does not say which "
        "are meant; models of one stack can be sliced"
    )


def donor_layer(donor: Member, index: int, made: Sequence[Slot]) -> int:
    """Return the donor's layer whose config settings fit a layer of the output.

    Args:
        donor: Model whose config the output gets.
        index: Number of the layer in the model that it comes from.
        made: The tensors of the layer.

    Returns:
        `index`, or the nearest layer whose tensors have the same names and shapes.

    Raises:
        CheckpointError: The donor has no such layer.
    """
    shapes = {_suffix(slot): next(iter(slot.inputs.values())).shape for slot in made}
    order = sorted(donor.layers, key=lambda own: (abs(own - index), own))
    nearest = {suffix: donor.checkpoint.tensors[name].shape for suffix, name in donor.layers[order[0]].items()}
    for own in order:
        held = {suffix: donor.checkpoint.tensors[name].shape for suffix, name in donor.layers[own].items()}
        if _needed(held) == _needed(shapes):
            return own
    sources = " and ".join(str(reference) for reference in made[0].inputs)
    raise CheckpointError(
        f"layer {made[0].part.layer} of the output, from {sources}: {_differences(shapes, nearest)} in layer {order[0]} of "
        f"{donor.reference}, whose config the output gets, and none of its other layers is the same; only layers of one "
        "architecture and size can be stacked"
    )


def _layer_kinds(member: Member) -> list[str]:
    """Return what config.json says of the kind of each layer ("mamba", "sliding_attention"); empty if it says nothing.

    Tensors of some kinds have the same names and shapes, so that they do not show it.
    """
    for scope in text_scopes(member.checkpoint.config):
        lists = {**implied_lists(scope, member.anatomy.n_layers), **scope}
        for key in _KINDS:
            kinds = lists.get(key)
            if isinstance(kinds, list) and len(kinds) == member.anatomy.n_layers:
                return [str(kind) for kind in kinds]
    return []


def odd_kinds(index: int, donor: Member, own: int, sources: Mapping[ModelReference, tuple[Member, int]]) -> str | None:
    """Return a warning if a layer is made from layers of another kind than the donor's, which it gets.

    Args:
        index: Number of the layer in the output.
        donor: Model whose config the output gets.
        own: The donor's layer whose settings it gets.
        sources: The models that it is made from, and the number of the layer in each.
    """
    kinds = _layer_kinds(donor)
    if not kinds:
        return None
    others = {r: (layer, held[layer]) for r, (member, layer) in sources.items() if (held := _layer_kinds(member))}
    odd = [f"layer {layer} of {r} is {kind}" for r, (layer, kind) in others.items() if kind != kinds[own]]
    if not odd:
        return None
    return f"layer {index} of the output is {kinds[own]}, as layer {own} of {donor.reference}, and {', '.join(odd)}"


def said_of_kinds(odd: Sequence[str]) -> list[str]:
    """Return one warning for all layers that are made from layers of other kinds; none if there is none."""
    if not odd:
        return []
    more = f"; and {plural(len(odd) - 1, 'more layer')}" if len(odd) > 1 else ""
    return [f"layers of different kinds are merged, since their tensors have the same shapes: {odd[0]}{more}"]


def _suffix(slot: Slot) -> str:
    return slot.name.removeprefix(f"{slot.part.stack}.{slot.part.layer}.")


def _needed(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {suffix: shape for suffix, shape in shapes.items() if not is_recomputed(f"h.0.{suffix}")}


def _differences(shapes: Mapping[str, Shape], others: Mapping[str, Shape]) -> str:
    for suffix in sorted(shapes.keys() | others.keys()):
        own, other = shapes.get(suffix), others.get(suffix)
        if own != other:
            texts = ["is missing" if shape is None else f"is {list(shape)}" for shape in (own, other)]
            return f"{suffix} {texts[0]}, but {texts[1]}"
    return "its tensors differ from those"


def check_outside(name: str, inputs: Mapping[ModelReference, TensorInfo], donor: Member, own: str) -> None:
    """Refuse a tensor outside the layers whose shape differs from the donor's.

    Args:
        name: Its name in the output.
        inputs: The tensors that it is made from.
        donor: Model whose config the output gets.
        own: Its name in the donor.

    Raises:
        CheckpointError: The shapes differ.
    """
    expected = donor.tensor(own)
    reference, tensor = next(iter(inputs.items()))
    if expected is None or expected.shape == tensor.shape:
        return
    part = donor.anatomy.parts.get(own)
    table = part is not None and part.role in ("embedding", "head") and expected.shape[1:] == tensor.shape[1:]
    why = "vocabularies differ" if table else "shapes differ"
    raise CheckpointError(
        f"{name}: {why}: {list(tensor.shape)} in {reference}, {list(expected.shape)} in {donor.reference}, whose config "
        "the output gets; only models of one architecture and size can be stacked"
    )
