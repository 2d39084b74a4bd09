"""The key `align` of a recipe: models are permuted to a reference before they are merged."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, cast

from ..anatomy.experts import EXPERTS
from ..anatomy.symmetry import UNITS
from ..errors import UnsupportedError
from .place import Entry, Place
from .reference import ModelReference
from .scalar import shown

__all__ = ["ALIGN_BY", "ALIGN_KEYS", "ALIGN_UNITS", "Align", "read_align"]

ALIGN_KEYS = ("to", "by", "units")
ALIGN_BY = ("weights",)
ALIGN_UNITS = (*UNITS, EXPERTS)

_DONOR = "base"
_DEFAULT_UNITS = ("mlp", "heads")


@dataclass(frozen=True, slots=True)
class Align:
    """How models are aligned.

    Args:
        to: The model that keeps its order.
        by: What is compared.
        units: Which units may be permuted, of `ALIGN_UNITS`.
        place: Where the recipe says it.
    """

    to: ModelReference
    by: Literal["weights"]
    units: tuple[str, ...]
    place: Place


def read_align(entry: Entry, models: Collection[ModelReference], reference: Callable[[Entry], ModelReference]) -> Align:
    """Read the key.

    Args:
        entry: Its value.
        models: The models of the recipe, the one that lends its config first.
        reference: Reads a model.

    Raises:
        RecipeError: A key or value is not allowed, or the reference is no model of the recipe.
        UnsupportedError: Models are to be compared by what this version cannot compare.
    """
    fields = entry.mapping(ALIGN_KEYS)
    to = next(iter(models))
    if "to" in fields and fields["to"].value != _DONOR:
        to = reference(fields["to"])
        if to not in models:
            raise fields["to"].error(f"{to} is no model of this recipe; it has {', '.join(map(str, models))}")
    if "by" in fields and fields["by"].value == "activations":
        raise UnsupportedError(f"{fields['by'].place}: matching by activations comes in a later version; use 'weights'")
    by = fields["by"].choice(ALIGN_BY) if "by" in fields else "weights"
    return Align(
        to,
        cast('Literal["weights"]', by),
        _units(fields["units"]) if "units" in fields else _DEFAULT_UNITS,
        entry.place,
    )


def _units(entry: Entry) -> tuple[str, ...]:
    found = [item.choice(ALIGN_UNITS) for item in (entry.items() if isinstance(entry.value, list) else [entry])]
    twice = next((each for each in found if found.count(each) > 1), None)
    if twice is not None:
        raise entry.error(f"names {shown(twice)} twice")
    return tuple(each for each in ALIGN_UNITS if each in found)
