"""The recipes that are tried without being asked for, and the search around the best of them.

Which methods, and with which scales, follows docs/quality.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...method.registry import get_method
from ...recipe.document.parsing import parse_mapping

LAYERS = 3
"""Values along the depth in the search around the best."""

KEPT = "keep_statistics"
"""Key of a recipe that says where statistics of texts are kept."""

_SEQUENCES = 16
_BYTES = 65_536
"""A text that is at least so long holds so many sequences of 256 tokens, since tokens are shorter than 16 bytes on average."""

_Listed = tuple[tuple[str, Mapping[str, Any]], ...]

_FULL: _Listed = (
    ("linear", {"weight": 1.0}),
    ("regmean", {"weight": 1.0}),
    ("featcal", {"weight": 1.0, "start": "wudi"}),
    ("iso_c", {"lambda": 1.5}),
    ("tsv_m", {"lambda": 1.0}),
    ("optmerge", {"lambda": 1.0}),
    ("iso_c", {"lambda": 1.0}),
    ("task_arithmetic", {"weight": 1.0, "lambda": 0.5}),
    ("ties", {"weight": 1.0, "density": 0.2}),
    ("wudi", {"lambda": 1.0}),
    ("task_arithmetic", {"weight": 1.0, "lambda": 1.0}),
    ("tsv_m", {"lambda": 0.5}),
    ("wudi", {"lambda": 0.5}),
    ("column_coefficients", {"weight": 1.0}),
    ("task_arithmetic", {"weight": 1.0, "lambda": 0.3}),
)
"""Methods that hold up on all sets of models there come first, then those that keep most on some."""

_ADAPTERS: _Listed = (
    ("linear", {"weight": 1.0}),
    ("regmean", {"weight": 1.0}),
    ("regmean_plus", {"weight": 1.0}),
    ("iso_c", {"lambda": 1.0}),
    ("featcal", {"weight": 1.0, "start": "wudi"}),
    ("task_arithmetic", {"weight": 1.0, "lambda": 0.5}),
    ("tsv_m", {"lambda": 0.5}),
    ("wudi", {"lambda": 0.5}),
    ("iso_c", {"lambda": 1.5}),
    ("ties", {"weight": 1.0, "density": 0.2}),
    ("task_arithmetic", {"weight": 1.0, "lambda": 1.0}),
)
"""Of adapters the scale of methods that leave the sum its length is halved."""


@dataclass(frozen=True)
class Candidate:
    """A recipe of the portfolio.

    Args:
        method: Name of the method.
        parameters: Its parameters.
        about: The rest of the recipe: models, base and data.
    """

    method: str
    parameters: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def recipe(self) -> str:
        """The recipe, as YAML."""
        return _recipe(self.method, self.parameters, self.about)

    @property
    def name(self) -> str:
        """Name of its recipe file."""
        told = [self.parameters[key] for key in ("start", "lambda") if key in self.parameters]
        return "-".join([self.method, *(each if isinstance(each, str) else f"{each:g}" for each in told)])


def candidates(
    base: str, experts: Sequence[str], *, texts: Sequence[Path] = (), kept: Path | None = None
) -> list[Candidate]:
    """Return the portfolio, in the order in which it is tried; adapters (`base+adapter`) have their own.

    Args:
        base: The base.
        experts: The experts.
        texts: Text of the field of each expert; without it there are no methods with data.
        kept: Folder for the statistics of the texts.
    """
    listed = _ADAPTERS if all("+" in each for each in experts) else _FULL
    about: dict[str, Any] = {"base_model": base, "models": [{"model": expert} for expert in experts]}
    measured = dict(about)
    if texts:
        measured["models"] = [{"model": e, "data": _data(text)} for e, text in zip(experts, texts, strict=True)]
        measured[KEPT] = str(kept)
    found = []
    for method, parameters in listed:
        with_data = get_method(method).from_data
        if with_data and not texts:
            continue
        candidate = Candidate(method, parameters, measured if with_data else about)
        if _measures_within(candidate):
            # its statistics are of this merge alone, so no other one may find them in its place
            candidate = replace(candidate, about={**measured, KEPT: str(Path(str(kept), candidate.name))})
        found.append(candidate)
    return found


def _measures_within(candidate: Candidate) -> bool:
    """Return whether the statistics of a candidate are measured within its merge, and so depend on all of the recipe."""
    method = get_method(candidate.method)
    return bool(method.from_data) and method.data_inputs != "own"


def _data(text: Path) -> str | dict[str, Any]:
    """Return what a recipe says of a text: fewer sequences than by default, if there are so many.

    On four experts 4,096 tokens of each kept as much as 16,384, within a percent (docs/quality.md), in a quarter of the time.
    """
    if text.stat().st_size < _BYTES:
        return str(text)
    return {"files": str(text), "sequences": _SEQUENCES}


def _about_around(best: Candidate) -> dict[str, Any]:
    """Return models, base and data of a recipe around a candidate.

    Other factors make another merge, whose statistics, if they are measured within it, are not those that were kept.
    """
    return {key: own for key, own in best.about.items() if not (key == KEPT and _measures_within(best))}


def plain_around(best: Candidate) -> str:
    """Return a recipe without open values that takes as long to merge as those around a candidate."""
    return _recipe(best.method, best.parameters, _about_around(best))


def around(best: Candidate) -> tuple[str, float]:
    """Return the recipe of a candidate with open values around its own, and the value of all of them at the candidate itself.

    They are factors by depth, of each model if it has some.

    Args:
        best: The candidate.
    """
    about = _about_around(best)
    known = get_method(best.method).parameters
    if "weight" in known:
        # the average depends on shares alone; the other methods' scale is in their weights
        name, value, per = "weight", best.parameters.get("weight", 1.0), ["model", f"layers:{LAYERS}"]
    else:
        name, value, per = "lambda", best.parameters.get("lambda", 1.0), [f"layers:{2 * LAYERS}"]
    span = [round(0.5 * value, 6), round(1.5 * value, 6)]
    return _recipe(best.method, {**best.parameters, name: {"search": span, "per": per}}, about), value


def _recipe(method: str, parameters: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    return parse_mapping({"merge_method": method, **about, "parameters": dict(parameters)}, "<auto>").text
