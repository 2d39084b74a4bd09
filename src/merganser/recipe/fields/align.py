"""The key `align` of a recipe: models are permuted to a reference before they are merged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from ...anatomy.experts import EXPERTS
from ...anatomy.symmetry import UNITS
from ..document.place import Entry, Place
from ..document.scalar import shown
from .data import Data, DataFields, make_data, read_data_fields
from .reference import ModelReference

__all__ = ["ALIGN_BY", "ALIGN_KEYS", "ALIGN_UNITS", "Align", "read_align"]

ALIGN_KEYS = ("to", "by", "units", "data")
ALIGN_BY = ("weights", "activations")
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
        data: On what the models are compared by activations; None if they are compared by weights.
        correlations: For every other model, by its reference as text, the folder of its correlations with `to`; None for
            one that is not made yet. None as a whole if nothing has been made or planned.
    """

    to: ModelReference
    by: Literal["weights", "activations"]
    units: tuple[str, ...]
    place: Place
    data: Data | None = None
    correlations: Mapping[str, str | None] | None = None


def read_align(
    entry: Entry,
    models: Collection[ModelReference],
    reference: Callable[[Entry], ModelReference],
    common: DataFields | None = None,
) -> Align:
    """Read the key.

    Args:
        entry: Its value.
        models: The models of the recipe, the one that lends its config first.
        reference: Reads a model.
        common: What the recipe says of data for all models.

    Raises:
        RecipeError: A key or value is not allowed, data are missing, or the reference is not a model of the recipe.
    """
    fields = entry.mapping(ALIGN_KEYS)
    to = next(iter(models))
    if "to" in fields and fields["to"].value != _DONOR:
        to = reference(fields["to"])
        if to not in models:
            raise fields["to"].error(f"{to} is not a model of this recipe; it has {', '.join(map(str, models))}")
    by = fields["by"].choice(ALIGN_BY) if "by" in fields else "weights"
    units = _units(fields["units"]) if "units" in fields else _DEFAULT_UNITS
    if by == "activations" and EXPERTS in units:
        raise fields["units"].error("experts are compared by weights only; leave them out, or align by weights")
    return Align(
        to,
        cast('Literal["weights", "activations"]', by),
        units,
        entry.place,
        _data(entry, fields, by, common),
    )


def _data(entry: Entry, fields: Mapping[str, Entry], by: str, common: DataFields | None) -> Data | None:
    """Return the data on which models are compared; what `align` says itself comes before what the recipe says for all."""
    if by == "weights":
        if "data" in fields:
            raise fields["data"].error(
                "weights are compared without data; add 'by: activations', or leave the data out"
            )
        return None
    if "data" not in fields and common is None:
        raise entry.error("'by: activations' runs the models on text; give 'data' here, or at the top of the recipe")
    own = read_data_fields(fields["data"]) if "data" in fields else None
    if own and "labels" in own:
        raise fields["data"].error("labels: units are compared without a loss; leave the key out")
    return make_data(fields.get("data", entry), common, own)


def _units(entry: Entry) -> tuple[str, ...]:
    found = [item.choice(ALIGN_UNITS) for item in (entry.items() if isinstance(entry.value, list) else [entry])]
    twice = next((each for each in found if found.count(each) > 1), None)
    if twice is not None:
        raise entry.error(f"names {shown(twice)} twice; name it once")
    return tuple(each for each in ALIGN_UNITS if each in found)
