"""The recipes that are tried without being asked for, and the search around the best of them.

Which methods, and with which scales, follows docs/quality.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...method.registry import get_method
from ...recipe.document import parse_mapping

LAYERS = 3
"""Values along the depth in the search around the best."""

_FULL: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("linear", {"weight": 1.0}),
    ("iso_c", {"lambda": 1.5}),
    ("iso_c", {"lambda": 1.0}),
    ("tsv_m", {"lambda": 1.0}),
    ("task_arithmetic", {"weight": 1.0, "lambda": 0.5}),
    ("ties", {"weight": 1.0, "density": 0.2}),
    ("wudi", {"lambda": 1.0}),
    ("optmerge", {"lambda": 1.0}),
    ("task_arithmetic", {"weight": 1.0, "lambda": 1.0}),
    ("tsv_m", {"lambda": 0.5}),
    ("wudi", {"lambda": 0.5}),
    ("task_arithmetic", {"weight": 1.0, "lambda": 0.3}),
)
"""Methods that hold up on all sets of models there come first, then those that keep most on some; the costly ones behind."""

_ADAPTERS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("linear", {"weight": 1.0}),
    ("iso_c", {"lambda": 1.0}),
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
        recipe: The recipe, as YAML.
    """

    method: str
    parameters: Mapping[str, Any]
    recipe: str

    @property
    def name(self) -> str:
        """Name of its recipe file."""
        scale = self.parameters.get("lambda")
        return self.method if scale is None else f"{self.method}-{scale:g}"


def candidates(base: str, experts: Sequence[str], *, adapters: bool) -> list[Candidate]:
    """Return the portfolio, in the order in which it is tried.

    Args:
        base: The base.
        experts: The experts.
        adapters: Whether the experts are adapters.
    """
    listed = _ADAPTERS if adapters else _FULL
    return [_candidate(base, experts, method, parameters) for method, parameters in listed]


def around(best: Candidate, base: str, experts: Sequence[str]) -> str:
    """Return the recipe of a candidate with open values around its own: factors by depth, of each model if it has some.

    Args:
        best: The candidate.
        base: The base.
        experts: The experts.
    """
    known = get_method(best.method).parameters
    if "weight" in known:
        # of the average only shares matter, so that the other methods' scale is in their weights
        name, value, per = "weight", best.parameters.get("weight", 1.0), ["model", f"layers:{LAYERS}"]
    else:
        name, value, per = "lambda", best.parameters.get("lambda", 1.0), [f"layers:{2 * LAYERS}"]
    span = [round(0.5 * value, 6), round(1.5 * value, 6)]
    return _recipe(base, experts, best.method, {**best.parameters, name: {"search": span, "per": per}})


def _candidate(base: str, experts: Sequence[str], method: str, parameters: Mapping[str, Any]) -> Candidate:
    return Candidate(method, parameters, _recipe(base, experts, method, parameters))


def _recipe(base: str, experts: Sequence[str], method: str, parameters: Mapping[str, Any]) -> str:
    recipe = {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": expert} for expert in experts],
        "parameters": dict(parameters),
    }
    return parse_mapping(recipe, "<auto>").text
