"""The result of one model on one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from .estimate import Estimate


@dataclass(frozen=True)
class Outcome:
    """The result of one model on one task.

    Args:
        metrics: The metrics by name, the main metric first; empty if the model failed.
        columns: Measurements of each item, by name; arrays of shape [items], or lists.
        items: Number of items.
        totals: Sums over all items: bytes and tokens of a text.
        higher_is_better: Whether higher is better, by metric.
        failed: Why there are no metrics; None if there are.
        chosen: For a routed model, how often it chose each task, by name; rows are windows or questions.
    """

    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    columns: Mapping[str, NDArray[Any] | list[Any]] = field(default_factory=dict)
    items: int = 0
    totals: Mapping[str, int] = field(default_factory=dict)
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    failed: str | None = None
    chosen: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as written to the JSON of an evaluation."""
        metrics = {name: estimate.to_json() for name, estimate in self.metrics.items()}
        chosen = {"chosen": dict(self.chosen)} if self.chosen else {}
        return {"failed": self.failed, "items": self.items, **self.totals, "metrics": metrics, **chosen}
