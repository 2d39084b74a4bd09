"""Align whole models: which tensors of which models are merged into each tensor of the output."""

from __future__ import annotations

from collections.abc import Sequence

from ...recipe import Recipe
from .alignment import (
    Alignment,
    Member,
    Slot,
    _anatomy,
    _check_names,
    _inputs,
    _names,
    after_layers,
    location_of,
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
    names, head, tied, drop = _names(donor, members, warnings)
    held = (name for member in members for name in member.checkpoint.tensors if name not in drop)
    unmatched = find_unmatched(recipe, donor, members, dict.fromkeys([*names, *held]))
    warnings += unmatched.warnings
    names = [name for name in names if name not in unmatched.dropped]
    matched = [name for name in names if name not in unmatched.kept]
    for member in members:
        names_of_member = set(member.checkpoint.tensors) - drop.keys() - unmatched.kept - unmatched.dropped
        # names of the output that the donor lacks come from another model
        lacking = (other for name in matched if donor.tensor(name) is None for other in members if other.tensor(name))
        _check_names(next(lacking, donor) if member is donor else donor, member, matched, names_of_member)
    end = after_layers(recipe)
    slots = []
    everyone = [donor, *members]
    for name in names:
        anatomy = _anatomy(name, everyone)
        part = anatomy.parts[name]
        rule = name
        if tied and name == head and donor.anatomy.embedding:
            # a tied head is the same matrix as the embedding, so the embedding's parameters apply
            rule = donor.anatomy.embedding
        depth = donor.anatomy.depth(name) if name in donor.anatomy.parts else None
        t = depth if depth is not None else (end if part.position == "after" and rule == name else 0.0)
        where = location_of(rule, anatomy if rule == name else _anatomy(rule, everyone))
        kept = name in unmatched.kept
        sources = [(member, name) for member in ([donor] if kept else members)]
        slots.append(Slot(name, rule, part, 0, t, where, _inputs(name, sources), kept))
    reasons = dict.fromkeys(unmatched.dropped, "not in all models in one shape")
    reasons |= dict.fromkeys(unmatched.kept, f"not in all models in one shape; taken from {donor.reference}")
    return Alignment(slots, tied, None, warnings, unmatched.dropped, {**drop, **reasons})
