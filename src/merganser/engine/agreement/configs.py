"""Compare configs: models with equal shapes may still use their tensors in different ways."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ...anatomy.settings.config import text_scopes
from ...anatomy.settings.function import Difference, differences
from ...errors import CheckpointError
from ...wording import some
from ..alignment.alignment import Alignment, Member

__all__ = ["compare_configs"]

_LONGEST = 60
_MOST = 6


def compare_configs(donor: Member, members: Collection[Member], alignment: Alignment) -> list[str]:
    """Compare the configs of the inputs with the donor's, which the output gets.

    Args:
        donor: Model whose config the output gets.
        members: All inputs.
        alignment: The tensors of the output.

    Returns:
        Warnings about differences that do not change the meaning of tensors.

    Raises:
        CheckpointError: The same tensors have different meanings in two models.
    """
    warnings = []
    for member in members:
        found = differences(donor.checkpoint.config, member.checkpoint.config)
        if member.reference in alignment.partial:
            found = _of_language_model(found, donor, member)
        differing = [_as_merged(each, alignment) for each in found]
        wrong = [each for each in differing if each.kind == "meaning"]
        if wrong:
            raise CheckpointError(
                f"{member.reference}: config.json interprets the same tensors differently from that of "
                f"{donor.reference}: {_listed(wrong)}. Only models that agree in this can be merged; where a "
                "config.json is wrong, correct it"
            )
        if acts := [each for each in differing if each.kind == "behaviour"]:
            warnings.append(
                f"{member.reference}: config.json differs from that of {donor.reference}, whose settings the output "
                f"gets: {_listed(acts)}"
            )
        if unknown := [each for each in differing if each.kind == "unknown"]:
            warnings.append(
                f"{member.reference}: config.json differs from that of {donor.reference} in settings whose effect is "
                f"not known here, so whether the models can be merged was not checked: {_listed(unknown)}"
            )
    return [*warnings, *_said_of_ties(donor, members, alignment)]


def _said_of_ties(donor: Member, members: Iterable[Member], alignment: Alignment) -> list[str]:
    """Warn of models whose tied embedding is merged into the donor's separate head."""
    head = donor.anatomy.head
    slot = next((slot for slot in alignment.slots if slot.name == head), None)
    if slot is None or alignment.tied or head not in donor.checkpoint.tensors:
        return []
    tied = [str(member.reference) for member in members if member.tied and member.reference in slot.inputs]
    if not tied or len(tied) == len(slot.inputs):
        return []
    return [
        f"{head}: {some(tied)} shares it with the embedding, and other models do not; the output's is its own matrix"
    ]


def _as_merged(found: Difference, alignment: Alignment) -> Difference:
    """Count a different order of labels as a change of behaviour, not of meaning, if no head of labels is merged."""
    if found.key != "id2label" or found.kind != "meaning":
        return found
    merged = any(
        slot.part.role == "head"
        and len(slot.inputs) > 1
        and next(iter(slot.inputs.values())).shape[0] == len(found.first)
        for slot in alignment.slots
    )
    return found if merged else replace(found, kind="behaviour")


def _of_language_model(found: Iterable[Difference], donor: Member, member: Member) -> list[Difference]:
    """Return the differences of the language models of two models, of which one has other modules.

    Their types have different names, and say nothing of the tensors: names and shapes were compared before.
    """
    around = _settings_around(donor) | _settings_around(member)
    towers = {each.key for each in found if "given" in (each.first, each.second)}
    own = [each for each in found if each.key not in towers | around and "." not in each.key]
    return [replace(each, kind="behaviour") if each.key == "model_type" else each for each in own]


def _settings_around(member: Member) -> set[str]:
    """Return the keys of a config beside that of the language model inside it."""
    outer, *inner = text_scopes(member.checkpoint.config)
    return set(outer) - {key for scope in inner for key in scope} if inner else set()


def _listed(found: Sequence[Difference]) -> str:
    """Describe differing settings, as in "rope_theta is 500000.0, not 10000.0"."""
    return some([f"{each.key} is {_shown(each.second)}, {_contrast(each.first)}" for each in found], _MOST)


def _contrast(value: Any) -> str:
    return "where it is not set" if value is None else f"not {_shown(value)}"


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
