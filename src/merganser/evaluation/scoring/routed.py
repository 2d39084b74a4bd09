"""Score a routed model: a task is chosen for each row, and the rows of one task are scored together by its model.

A model with gates, or of unequal experts, scores all rows at once, and the task with the largest share of a row counts as chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...runtime.routed import RoutedModel
from ...runtime.routed.gated.evaluated import GatedLanguageModel
from ...runtime.routed.opened import SHARED, RoutedLanguageModel
from ...runtime.routed.unequal.evaluated import UnequalLanguageModel
from .batches import Prepared

__all__ = ["CHOSEN", "chosen_of", "measure_gated", "measure_routed"]

CHOSEN = "chosen"
"""The column with the task of each row; of several, that with the largest share."""


def measure_routed(
    opened: RoutedLanguageModel, loaded: RoutedModel, measured: str, prepared: Prepared, rows: Sequence[int]
) -> dict[str, Any]:
    """Score a batch of rows, as `Prepared.measure` does, and say which task was chosen for each.

    Args:
        opened: The routed model.
        loaded: The same, loaded.
        measured: Name of the task that is scored.
        prepared: The task that is scored.
        rows: Indices of rows.

    Raises:
        Refused: The output of a task's model cannot be scored.
    """
    mixes = opened.mixes(loaded, measured, [prepared.prompt(row) for row in rows])
    columns: dict[str, list[Any]] = {}
    for mix in sorted(set(mixes), key=loaded.loaded_first):
        own = [place for place, other in enumerate(mixes) if other == mix]
        model = loaded.shared if mix[0][0] == SHARED else loaded.model(mix)
        for name, values in prepared.measure(model, [rows[place] for place in own]).items():
            column = columns.setdefault(name, [None] * len(rows))
            for place, value in zip(own, values, strict=True):
                column[place] = value
    return {**columns, CHOSEN: [mix[0][0] for mix in mixes]}


def measure_gated(
    opened: GatedLanguageModel | UnequalLanguageModel,
    loaded: Any,
    prepared: Prepared,
    rows: Sequence[int],
) -> dict[str, Any]:
    """Score a batch of rows, as `Prepared.measure` does, and say which task has the largest share of each.

    Args:
        opened: The model with gates, or of unequal experts.
        loaded: The same, loaded.
        prepared: The task that is scored.
        rows: Indices of rows.

    Raises:
        Refused: The output of the model cannot be scored.
    """
    most = opened.most(loaded, [prepared.prompt(row) for row in rows])
    return {**prepared.measure(loaded.model, rows), CHOSEN: most}


def chosen_of(contents: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how often each task was chosen, from the measurements of all batches; empty if nothing was chosen."""
    counts: Counter[str] = Counter()
    for content in contents:
        counts.update(content.get(CHOSEN, ()))
    return dict(sorted(counts.items()))
