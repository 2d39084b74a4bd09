"""Recipes of ordinary merges that a mixture is made from: models as these write them, and where their errors belong."""

from __future__ import annotations

import re
from typing import Any

from ..recipe import ModelReference, Place

__all__ = ["replaced", "written"]

_PLACE = re.compile(r"^<recipe>[^ ]*( [\w.\[\]]+)?: ")


def replaced(message: str, place: Place) -> str:
    """Return a message about a recipe of ours, whose lines say nothing to the user, with the place in the user's recipe."""
    return _PLACE.sub(f"{place}: ", message)


def written(model: ModelReference) -> dict[str, Any]:
    """Return a reference as a recipe writes it."""

    def part(path: str, revision: str | None) -> dict[str, str]:
        return {"path": path, **({"revision": revision} if revision else {})}

    if model.lora is None:
        return part(model.path, model.revision)
    return {"model": part(model.path, model.revision), "lora": part(model.lora, model.lora_revision)}
