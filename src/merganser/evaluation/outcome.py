"""What a model got in a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from .estimate import Estimate


@dataclass(frozen=True)
class Outcome:
    """What a model got in a task.

    Args:
        metrics: The metrics, the one that counts first; empty where the model failed.
        columns: What was measured on each item, by name; arrays of shape [items], or lists.
        items: Number of items.
        totals: What all items are together: bytes and tokens of a text.
        higher_is_better: By metric.
        failed: Why there are no metrics.
    """

    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    columns: Mapping[str, NDArray[Any] | list[Any]] = field(default_factory=dict)
    items: int = 0
    totals: Mapping[str, int] = field(default_factory=dict)
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    failed: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what the JSON of an evaluation says of it."""
        metrics = {name: estimate.to_json() for name, estimate in self.metrics.items()}
        return {"failed": self.failed, "items": self.items, **self.totals, "metrics": metrics}
