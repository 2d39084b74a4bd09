"""One free number, or one free choice, of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Point: TypeAlias = "Mapping[str, float | int]"
"""A value of each dimension by its name; of a choice, its index."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """One free number, or one free choice.

    Args:
        name: Where it stands in the recipe, such as `models[0].parameters.weight`.
        low: Lowest value.
        high: Highest value.
        log: Whether ratios matter and not differences.
        step: Distance between values of a grid; None for any value.
        integer: Whether values are whole numbers.
        choices: Values to choose from; None for a number.
        parameter: Name of the method's parameter; None for another key.
        per_model: Whether other models have a dimension of the same parameter.
        middle: Where a search begins; None for the middle of the range.
        when: Name of another dimension, and the index of the choice of it with which this one has a value; None if it always has.
    """

    name: str
    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False
    choices: tuple[Any, ...] | None = None
    parameter: str | None = None
    per_model: bool = False
    middle: float | None = None
    when: tuple[str, int] | None = None

    def is_open(self, point: Point) -> bool:
        """Return whether this has a value at a point, of which the dimensions before this one are known."""
        return self.when is None or point.get(self.when[0]) == self.when[1]

    def value(self, point: Point) -> Any:
        """Return the value at a point, as it stands in a recipe."""
        found = point[self.name]
        return self.choices[int(found)] if self.choices is not None else found

    def start(self, models: int) -> float | int:
        """Return where a search begins: the middle; of a weight, an equal share of the models; of choices, the first.

        Args:
            models: Number of models of the recipe.
        """
        if self.choices is not None:
            return 0
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        if self.parameter == "weight" and self.per_model and self.low <= 1 / models <= self.high:
            middle = 1 / models
        if self.middle is not None:
            middle = self.middle
        if self.step is not None:
            middle = self.low + self.step * round((middle - self.low) / self.step)
        middle = min(max(middle, self.low), self.high)
        return round(middle) if self.integer else middle
