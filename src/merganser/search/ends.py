"""The held-out test: the winner, the models that were merged, and their average, measured on items that no trial saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.scoring.estimate import Estimate
from ..recipe import Recipe
from ..recipe.document.parsing import parse_mapping
from .difference import Difference
from .scoring.bench import Failed, Model
from .scoring.judge import Judge
from .scoring.objectives import Objective
from .trials import Progress

_SURE = 0.95
"""How often an interval holds the truth."""


@dataclass(frozen=True)
class End:
    """A model, measured on the items held out.

    Args:
        name: Its name.
        role: "winner", "input", "average".
        values: The objectives; None if it failed.
        failed: Why it has none.
    """

    name: str
    role: str
    values: tuple[Estimate, ...] | None
    failed: str | None = None


def difference(own: Estimate, other: Estimate, objective: Objective) -> Difference:
    """Return how much better a model is than another on the same items."""
    from scipy.stats import t

    found = (own - other) * objective.sign
    error = found.stderr if found.parts else None
    if error is None:
        return Difference(found.value, None)
    # with few items an interval of 1.96 errors holds the truth far less often than it says
    half = float(t.ppf((1 + _SURE) / 2, found.degrees_of_freedom)) * error
    return Difference(found.value, (found.value - half, found.value + half))


def measure_ends(models: Sequence[tuple[Model, str]], judge: Judge, progress: Progress) -> list[End]:
    """Measure models on the items held out.

    Args:
        models: Models, each with its role.
        judge: Measures them.
        progress: Receives the progress.
    """
    ends = []
    for model, role in models:
        progress.testing(model.name)
        try:
            ends.append(End(model.name, role, tuple(judge.final(model))))
        except Failed as error:
            ends.append(End(model.name, role, None, str(error)))
    return ends


def best_single(ends: Sequence[End], objective: Objective) -> End | None:
    """Return the best of the models that were merged; chosen on the same items, which favours it slightly."""
    inputs = [(objective.sign * end.values[0].value, end) for end in ends if end.role == "input" and end.values]
    return max(inputs, key=lambda each: each[0])[1] if inputs else None


def average_of(recipes: Sequence[Recipe]) -> str | None:
    """Return the recipe of the average of the models that a recipe merges; None where they cannot be averaged simply.

    Args:
        recipes: The recipe at any point of the search.
    """
    recipe = recipes[-1]
    models = [source.model for source in recipe.models if source.model != recipe.base_model]
    if len(recipes) > 1 or len(models) < 2 or recipe.slices:
        return None
    average: dict[str, Any] = {"merge_method": "linear"}
    average["models"] = [{"model": str(model)} for model in models]
    if recipe.base_model is not None:
        average["base_model"] = str(recipe.base_model)
    average["parameters"] = {"weight": 1.0}
    for key in ("dtype", "out_dtype"):
        if (value := getattr(recipe, key)) is not None:
            average[key] = value
    return parse_mapping(average, "<average>").text


def to_json(ends: Sequence[End], objectives: Sequence[Objective]) -> list[dict[str, Any]]:
    """Return ends as plain data, each with how much better the winner is."""
    winner = next((end for end in ends if end.role == "winner" and end.values), None)
    return [
        {
            "name": end.name,
            "role": end.role,
            "failed": end.failed,
            "values": None if end.values is None else [_plain(value) for value in end.values],
            "winner_better_by": None
            if winner is None or end is winner or not end.values or not winner.values
            else [
                difference(a, b, objective).to_json()
                for a, b, objective in zip(winner.values, end.values, objectives, strict=True)
            ],
        }
        for end in ends
    ]


def _plain(value: Estimate) -> Mapping[str, float | None]:
    return {"value": value.value, "stderr": value.stderr if value.parts else None}
