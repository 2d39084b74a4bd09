"""The merge methods and their descriptions, without importing one: that would import torch.

`catalogue.json` holds the descriptions of our own methods and is made from their files by `docs/generate.py`. Methods of
other packages are found by their entry points.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from ..errors import did_you_mean
from .elsewhere import ELSEWHERE, Elsewhere, elsewhere

__all__ = [
    "ELSEWHERE",
    "FIRST",
    "Elsewhere",
    "MethodDescription",
    "ParameterDescription",
    "canonical_name",
    "described",
    "factor_names",
    "own_names",
    "third_party",
    "unknown_method",
]

ENTRY_POINT_GROUP = "merganser.methods"
CATALOGUE = Path(__file__).with_name("catalogue.json")

FIRST = {
    "linear": "the average: needs nothing, and says what any other merge has to beat",
    "iso_c": "needs a base; kept 60 % or more in every column of our table, untuned",
    "regmean": "needs a base and some text of each model's field; kept most of our four adapters",
}
"""The methods to try first, in this order, and why; the figures are in docs/quality.md."""


@dataclass(frozen=True, slots=True)
class ParameterDescription:
    """A parameter of a method.

    Args:
        name: Name in recipes.
        allowed: Allowed values, in words.
        per_model: Whether each model has its own value.
        required: Whether a recipe must give it.
        default: Value if a recipe gives none.
        help: What it does.
    """

    name: str
    allowed: str
    per_model: bool
    required: bool
    default: Any
    help: str


@dataclass(frozen=True, slots=True)
class MethodDescription:
    """A merge method.

    Args:
        name: Name in recipes.
        family: Group of methods.
        summary: One line.
        formula: How the result is computed.
        use_when: When it is a good choice.
        models: How many models it takes, in words.
        scope: What one call works on: "element", "row", "tensor" or "matrix".
        random: Whether the result depends on the seed.
        from_data: The statistics from data that it needs.
        from_data_of_base: Those that it needs of the base, on the data of every model.
        data_of: Of what it needs the former: "models" (every one), "base" or "first" (the first model).
        data_inputs: What computes the inputs that they are of, as in `FromData`: "own", "prefix", "merged", "fitted",
            "mean", "zipped" or "end_to_end".
        sidecar: Whether it stores data for each model from which the model can be restored.
        parameters: Its parameters, in order.
        differs: Where it differs from the paper; empty if it does not.
        cite: Key in `references.bib`, "-" if nothing was published.
        citation: Authors, title and year; None without `references.bib`.
        breaks: Laws of the contract suite that do not hold for this method, each with the reason.
        no_effect: Parameters that are accepted only for compatibility with mergekit, each with the reason.
        version: Raised when results change.
    """

    name: str
    family: str
    summary: str
    formula: str
    use_when: str
    models: str
    scope: str
    random: bool
    from_data: Sequence[str]
    from_data_of_base: Sequence[str]
    data_of: str
    data_inputs: str
    sidecar: bool
    parameters: Sequence[ParameterDescription]
    differs: str
    cite: str
    citation: str | None
    breaks: Mapping[str, str]
    no_effect: Mapping[str, str]
    version: int


def own_names() -> frozenset[str]:
    """Return the names of our own methods for models."""
    return _files("methods")


def factor_names() -> frozenset[str]:
    """Return the names of our own methods for the factors of adapters."""
    return _files("factor_methods")


def third_party() -> dict[str, EntryPoint]:
    """Return the entry points of methods of other packages, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def canonical_name(name: str) -> str:
    """Return the method's name for a spelling that differs in case, or has `-` for `_`; other names as they are."""
    own = own_names() | factor_names()
    if name in own:
        return name
    known = own | set(third_party())
    if name in known:
        return name
    plain = {_plain(each): each for each in sorted(known)}
    return plain.get(_plain(name), name)


def unknown_method(name: str) -> str:
    """Return the message for a name that no method has; published methods that are elsewhere, or not here, are known."""
    if (said := elsewhere(name)) is not None:
        return said
    known = sorted(own_names() | factor_names() | set(third_party()))
    near = did_you_mean(name, known)
    return f"unknown merge method {name!r}." + (
        f"{near} `merganser methods` lists all" if near else f" Known: {', '.join(known)}"
    )


def described() -> tuple[dict[str, MethodDescription], dict[str, list[dict[str, Any]]]]:
    """Return the descriptions of our methods, and their passes over the inputs, by name.

    A method whose file is newer than the catalogue's list of names is missing; its file has to be imported.
    """
    found: dict[str, MethodDescription] = {}
    passes: dict[str, list[dict[str, Any]]] = {}
    for name, entry in _catalogue().items():
        known = dict(entry)
        passes[name] = known.pop("passes")
        parameters = [ParameterDescription(**each) for each in known.pop("parameters")]
        found[name] = MethodDescription(**known, parameters=parameters)
    return found, passes


@lru_cache(maxsize=1)
def _catalogue() -> dict[str, Any]:
    if not CATALOGUE.exists():
        return {}
    loaded: dict[str, Any] = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    there = own_names() | factor_names()
    return {name: entry for name, entry in loaded.items() if name in there}


@lru_cache(maxsize=2)
def _files(folder: str) -> frozenset[str]:
    return frozenset(
        path.stem for path in (Path(__file__).parents[1] / folder).glob("*.py") if not path.stem.startswith("_")
    )


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")
