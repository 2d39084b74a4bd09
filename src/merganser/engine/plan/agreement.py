"""What the files beside the weights say of the inputs: configs and tokenizers that make other things of equal shapes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ...anatomy.function import Difference, differences
from ...errors import CheckpointError
from ...wording import some
from .alignment import Member

__all__ = ["compare_configs"]

_LONGEST = 60
_MOST = 6


def compare_configs(donor: Member, members: Iterable[Member]) -> list[str]:
    """Compare the configs of the inputs with the donor's, which the output gets.

    Returns:
        What differs without changing what the tensors mean.

    Raises:
        CheckpointError: The same tensors mean something else in two models.
    """
    warnings = []
    for member in members:
        found = differences(donor.checkpoint.config, member.checkpoint.config)
        wrong = [each for each in found if each.kind == "meaning"]
        if wrong:
            raise CheckpointError(
                f"{member.reference}: config.json reads the same tensors in another way than that of "
                f"{donor.reference}: {_listed(wrong)}. Only models that agree in this can be merged; where a "
                "config.json is wrong, correct it"
            )
        if acts := [each for each in found if each.kind == "behaviour"]:
            warnings.append(
                f"{member.reference}: config.json differs from that of {donor.reference}, whose settings the output "
                f"gets: {_listed(acts)}"
            )
        if unknown := [each for each in found if each.kind == "unknown"]:
            warnings.append(
                f"{member.reference}: config.json differs from that of {donor.reference} in settings whose effect is "
                f"not known here, so whether the models can be merged was not checked: {_listed(unknown)}"
            )
    return warnings


def _listed(found: Sequence[Difference]) -> str:
    """Write settings as "rope_theta is 500000.0, not 10000.0"."""
    return some([f"{each.key} is {_shown(each.second)}, {_contrast(each.first)}" for each in found], _MOST)


def _contrast(value: Any) -> str:
    return "where it is not set" if value is None else f"not {_shown(value)}"


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
