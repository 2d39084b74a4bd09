"""The card of an output on the Hub: that of the merge, with base models and licences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from .front_matter import FENCE, front_matter

if TYPE_CHECKING:
    from .licences import InputLicence

__all__ = ["published_card"]


def published_card(card: str, licences: Sequence[InputLicence], licence: str | None) -> str:
    """Return the card to upload.

    Args:
        card: The README.md that the merge wrote.
        licences: The inputs with their licences.
        licence: The output's licence; None to state none.
    """
    told, text = front_matter(card)
    told.setdefault("tags", ["merge", "merganser"])
    bases = [each.model for each in licences if each.on_hub]
    # the card of an adapter names the model that it is for
    if bases and told.get("library_name") != "peft":
        told |= {"base_model": bases, "base_model_relation": "merge"}
    if licence is not None:
        told["license"] = licence
    rows = [
        f"| {_cell(each.model)} | {_cell(each.licence or 'not known')} | {_cell(each.source)} |" for each in licences
    ]
    section = "\n".join(["## Licences of the inputs", "", "| model | licence | found in |", "|---|---|---|", *rows])
    top = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
    return f"{FENCE}{top}{FENCE}{text.rstrip()}\n\n{section}\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
