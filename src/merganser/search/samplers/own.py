"""A sampler of ours as Optuna calls it: a function of the trials so far, without memory of its own.

What it proposes depends on the seed, the number of the trial and the trials before it only, so a study that was killed goes on
as if it had not been.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ..space.dimension import Dimension

Point: TypeAlias = "Mapping[str, float | int]"

SCORES = "scores"
"""Name under which the scores of items are stored with a trial."""


@dataclass(frozen=True, slots=True)
class Past:
    """An earlier trial.

    Args:
        number: Its number, from 0.
        at: Its place, one coordinate from 0 to 1 for each dimension; of choices see `to_unit`.
        values: The objectives, where higher is better; None if it failed or misses a bound.
        items: Score of each item, at least 0, where higher is better; None if it was not scored on all, or if they are not kept.
    """

    number: int
    at: tuple[float, ...]
    values: tuple[float, ...] | None
    items: tuple[float, ...] | None = None

    @property
    def value(self) -> float | None:
        """The first objective; None where there is none."""
        return None if self.values is None else self.values[0]


class Propose(Protocol):
    """Proposes the place of a trial."""

    def __call__(
        self, dimensions: Sequence[Dimension], past: Mapping[int, Past], number: int, seed: int
    ) -> Sequence[float]:
        """Return a coordinate from 0 to 1 for each dimension.

        Args:
            dimensions: The search space.
            past: The earlier trials that are over, by number.
            number: Number of the trial, at least 1; trial 0 is the start of the search.
            seed: Seed of the study.
        """


def to_unit(dimension: Dimension, value: float) -> float:
    """Return the coordinate of a value: 0 at the lowest, 1 at the highest; choice i of n is at (i + 0.5) / n."""
    if dimension.choices is not None:
        return (value + 0.5) / len(dimension.choices)
    low, high = dimension.low, dimension.high
    if high == low:
        return 0.5
    if dimension.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def from_unit(dimension: Dimension, at: float) -> float | int:
    """Return the value at a coordinate, on the grid of the dimension; coordinates outside 0 to 1 count as the ends."""
    at = min(max(at, 0.0), 1.0)
    if dimension.choices is not None:
        return min(int(at * len(dimension.choices)), len(dimension.choices) - 1)
    low, high = dimension.low, dimension.high
    value = low * (high / low) ** at if dimension.log else low + at * (high - low)
    step = dimension.step or (1 if dimension.integer else None)
    if step is not None:
        steps = min(round((value - low) / step), int((high - low) / step + 1e-9))
        value = low + step * steps
    value = min(max(value, low), high)
    return round(value) if dimension.integer else value


def chance(seed: int, *parts: int) -> random.Random:
    """Return a random generator that depends on these numbers only."""
    return random.Random(" ".join(map(str, (seed, *parts))))


def wrap(optuna: Any, propose: Propose, dimensions: Sequence[Dimension], spaces: Mapping[str, Any], seed: int) -> Any:
    """Return a sampler of Optuna's kind.

    Args:
        optuna: The module.
        propose: Proposes places.
        dimensions: The search space.
        spaces: The same as Optuna's distributions, by name.
        seed: Seed of the study.
    """

    class Sampler(optuna.samplers.BaseSampler):  # type: ignore[misc]
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return dict(spaces)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, float | int]:
            if trial.number == 0:
                return {}
            at = propose(dimensions, _past(optuna, study, dimensions), trial.number, seed)
            return {d.name: from_unit(d, coordinate) for d, coordinate in zip(dimensions, at, strict=True)}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            # trial 0, whose point is enqueued
            return optuna.samplers.RandomSampler(seed=seed).sample_independent(
                study, trial, param_name, param_distribution
            )

    return Sampler()


def _past(optuna: Any, study: Any, dimensions: Sequence[Dimension]) -> dict[int, Past]:
    states = optuna.trial.TrialState
    signs = [1.0 if each == optuna.study.StudyDirection.MAXIMIZE else -1.0 for each in study.directions]
    found = {}
    for trial in study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL)):
        counts = trial.state == states.COMPLETE and all(by <= 0 for by in trial.constraints.values())
        # where a value has no meaning, such as the scale of what is not used, any will do
        at = tuple(to_unit(d, trial.params[d.name]) if d.name in trial.params else 0.5 for d in dimensions)
        values = tuple(s * value for s, value in zip(signs, trial.values, strict=True)) if counts else None
        items = trial.user_attrs.get(SCORES)
        found[trial.number] = Past(trial.number, at, values, None if items is None else tuple(items))
    return found
