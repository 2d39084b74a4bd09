"""Print how a merge changes vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...wording import plural
from .text import table

__all__ = ["vocabulary_lines"]

_HOW = {
    "copy": "copied from another model",
    "mean": "averaged over the models that have the token",
    "mean of all rows": "set to the mean of all rows",
    "zero": "set to zero",
    "combined": "combined from shared tokens",
    "romanised": "of tokens in Latin letters",
    "parts": "made of their parts",
    "network": "made of their parts by a trained network",
}


def vocabulary_lines(found: Mapping[str, Any]) -> list[str]:
    """Describe a changed vocabulary: the output's tokens and rows, and what happens to the rows of each model.

    Args:
        found: The entry `vocabulary` of a run record or of a plan's summary.
    """
    new = f" and {found['added']:,} new" if found["added"] else ""
    old = found["tokens"] - found["added"]
    rows = [[each["model"], plural(each["rows"], "row"), _rows(each)] for each in found["models"]]
    return [
        f"  {plural(old, 'token')} of {found['tokenizer_of']}{new}, in {plural(found['rows'], 'row')}",
        *table(rows, right=(1,)),
    ]


def _rows(model: Mapping[str, Any]) -> str:
    parts = [f"{model['kept']:,} kept"]
    if model["moved"]:
        parts.append(f"{model['moved']:,} moved")
    parts += [f"{count:,} {_HOW[how]}" for how, count in model["made"].items()]
    if model["lost"]:
        parts.append(f"{plural(model['lost'], 'token')} left out")
    return ", ".join(parts)
