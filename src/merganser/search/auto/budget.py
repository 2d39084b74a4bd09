"""The minutes of a call: how many items fit into them, and what may still begin.

Scoring takes most of the time. How long one item takes is measured on the base; with it follows what the models, the
held-out test and each recipe will take. A call that continues another one takes over what that measured, from the table of items.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engine.either import the_model
from ...engine.merge import plan
from ...errors import MergeError
from ..scoring.bench import Bench, Model
from ..scoring.items import HELD

__all__ = ["Budget", "keep_waves"]

_REFERENCES = 0.5
"""Largest share of the time for scoring the models that are merged, and for the held-out test."""

_PORTFOLIO = 0.65
"""Share of the remaining time after which the portfolio begins nothing new."""


def keep_waves(bench: Bench, models: Sequence[Model], minutes: float) -> tuple[int, str | None]:
    """Return how many waves of items fit into the minutes, and what the user should know if it is too little.

    The base is scored on the first wave. Loading it does not count.

    Args:
        bench: Scores the models.
        models: The base and the experts.
        minutes: The time.

    Raises:
        Failed: The base cannot be scored.
    """
    # loading takes as long for few items as for many, and the first one imports all that models need
    bench.load(models[0])
    bench.score(models[0], [0])
    table = bench.table
    seconds = table.pace([models[0].key])
    for kept in range(len(table.waves), 0, -1):
        # every model, the average and the winner, on the items of trials and on as many that are held out
        needed = seconds * 2 * table.count(table.waves[:kept]) * (len(models) + 2)
        if needed <= 60 * minutes * _REFERENCES:
            return kept, None
    return 1, (
        f"scoring {len(models) + 2} models takes about {needed / 60:.0f} minutes of the {minutes:g} even on a part of the "
        "items; give more minutes, or fewer items (--limit)"
    )


@dataclass
class Budget:
    """What is left of the minutes.

    Args:
        bench: Scores the models; those to merge were scored.
        until: When everything is to be over, on `time.monotonic()`.
        item: Seconds to score a model on one item, `Table.pace` of the models that are merged.
        finals: Number of models in the held-out test.
        options: Keyword arguments of `plan`.
    """

    bench: Bench
    until: float
    item: float
    finals: int
    options: Mapping[str, Any] = field(default_factory=dict)
    _portfolio: float | None = None

    @property
    def testing(self) -> float:
        """Seconds that the held-out test takes."""
        return self.finals * self.item * self.bench.table.count([HELD])

    @property
    def for_trials(self) -> float:
        """Seconds that are left for trials."""
        return self.until - time.monotonic() - self.testing

    def fits(self, recipe: str) -> bool:
        """Return whether a recipe of the portfolio can be merged and scored in its part of the time."""
        if self._portfolio is None:
            self._portfolio = time.monotonic() + _PORTFOLIO * self.for_trials
        return time.monotonic() + self.seconds(recipe) <= self._portfolio

    def seconds(self, recipe: str) -> float:
        """Return the seconds that merging a recipe and scoring it takes, from its plan."""
        return self.item * self.bench.table.count(self.bench.table.waves) + self.merging(recipe)

    def merging(self, recipe: str) -> float:
        """Return the seconds that merging a recipe takes, from its plan; statistics that are kept take none."""
        try:
            planned = the_model(plan(recipe, **self.options))
        except MergeError:
            # what is wrong with it shows when it is tried
            return 0.0
        return planned.seconds + sum(each.seconds for each in planned.calibrations)

    def last_trial(self, seconds: float, merging: float = 0.0) -> float:
        """Return when the last trial may begin, on `time.monotonic()`.

        Args:
            seconds: How long it takes.
            merging: How long the merge of the winner takes, which comes after the held-out test.
        """
        return self.until - self.testing - merging - seconds
