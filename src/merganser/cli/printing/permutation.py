"""Print how a merge permutes models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .text import table

__all__ = ["permutation_lines"]

_NAMES = {"mlp": "hidden units", "heads": "heads", "residual": "channels", "experts": "experts"}


def permutation_lines(found: Mapping[str, Any]) -> list[str]:
    """Describe how many units of each model are moved.

    Args:
        found: The entry `permutation` of a run record or of a plan's summary.
    """
    return table([[each["model"], _moved(each["moved"])] for each in found["models"]])


def _moved(moved: Mapping[str, Mapping[str, int]]) -> str:
    if not moved:
        return "matched when the models are there and have run"
    return ", ".join(f"{each['units']:,} of {each['of']:,} {_NAMES[kind]} move" for kind, each in moved.items())
