"""Align whole models: which tensors of which models are merged into each tensor of the output."""

from __future__ import annotations

from collections.abc import Sequence

from ...anatomy import Part
from ...method import Location
from ...recipe import Recipe
from .alignment import (
    Alignment,
    Member,
    Slot,
    after_layers,
    anatomy_with,
    check_names,
    inputs_of,
    location_of,
    output_names,
)
from .unmatched import find_unmatched


def align_models(recipe: Recipe, donor: Member, members: Sequence[Member]) -> Alignment:
    """Align whole models.

    Args:
        recipe: A recipe with models.
        donor: Model that defines the names and their order.
        members: All inputs of the merge.

    Raises:
        CheckpointError: Tensors are missing, unexpected, or of different shapes.
    """
    warnings: list[str] = []
    names, head, tied, drop = output_names(donor, members, warnings)
    held = (name for member in members for name in member.checkpoint.tensors if name not in drop)
    unmatched = find_unmatched(recipe, donor, members, dict.fromkeys([*names, *held]))
    warnings += unmatched.warnings
    names = [name for name in names if name not in unmatched.dropped]
    matched = [name for name in names if name not in unmatched.kept]
    for member in members:
        names_of_member = set(member.checkpoint.tensors) - drop.keys() - unmatched.kept - unmatched.dropped
        # names of the output that the donor lacks come from another model
        lacking = (other for name in matched if donor.tensor(name) is None for other in members if other.tensor(name))
        check_names(next(lacking, donor) if member is donor else donor, member, matched, names_of_member)
    rules = {}
    if tied and head and donor.anatomy.embedding:
        # a tied head is the same matrix as the embedding, so the embedding's parameters apply
        rules[head] = donor.anatomy.embedding
    places = _Places(donor, members, after_layers(recipe))
    slots = []
    for name in names:
        rule = rules.get(name, name)
        part, t, where = places.of(name, rule)
        kept = name in unmatched.kept
        sources = [(member, name) for member in ([donor] if kept else members)]
        slots.append(
            Slot(
                name=name,
                rule=rule,
                part=part,
                slice_index=0,
                t=t,
                location=where,
                inputs=inputs_of(name, sources),
                kept=kept,
            )
        )
    reasons = dict.fromkeys(unmatched.dropped, "not in all models in one shape")
    reasons |= dict.fromkeys(unmatched.kept, f"not in all models in one shape; taken from {donor.reference}")
    return Alignment(slots, tied, None, warnings, unmatched.dropped, {**drop, **reasons})


class _Places:
    """Where tensors are in the output; the tensors of one layer and role share their place.

    Args:
        donor: Model that defines the names and their order.
        members: All inputs of the merge.
        end: Position in layer schedules of what comes after the layers.
    """

    def __init__(self, donor: Member, members: Sequence[Member], end: float) -> None:
        self._donor = donor
        self._everyone = [donor, *members]
        self._end = end
        self._found: dict[tuple[object, ...], tuple[float, Location]] = {}

    def of(self, name: str, rule: str) -> tuple[Part, float, Location]:
        """Return the structure of a tensor's name, its position in layer schedules, and its location.

        Args:
            name: Its name.
            rule: The name that parameter filters match.
        """
        part = self._donor.anatomy.parts.get(name)
        if part is None or rule != name:
            return (part or anatomy_with(name, self._everyone).parts[name], *self._find(name, rule))
        key = (part.stack, part.layer, part.position, part.role)
        if key not in self._found:
            self._found[key] = self._find(name, rule)
        return (part, *self._found[key])

    def _find(self, name: str, rule: str) -> tuple[float, Location]:
        anatomy = anatomy_with(name, self._everyone)
        depth = self._donor.anatomy.depth(name) if name in self._donor.anatomy.parts else None
        after = anatomy.parts[name].position == "after" and rule == name
        t = depth if depth is not None else (self._end if after else 0.0)
        return t, location_of(rule, anatomy_with(rule, self._everyone))
