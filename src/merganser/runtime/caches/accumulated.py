"""Layers that sum what every entry was attended to so far."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import weights
from ..layer import ScoredLayer
from ..options import at_least

__all__ = ["AccumulatedLayer"]


class AccumulatedLayer(ScoredLayer):
    """A layer whose entries carry `attention`, the sum of the weights that they got, and `chances`, from how many queries.

    Args:
        budget: Entries per layer and head.
        sinks: First tokens that stay.
        window: Last tokens that stay.
        pool: Entries of which the highest score counts for the middle one, when it is chosen.
        history: Of each call, the weights of as many last queries are recomputed and summed.
    """

    def __init__(self, *, budget: int, sinks: int = 4, window: int = 32, pool: int = 1, history: int = 512):
        super().__init__(budget=budget, sinks=sinks, window=window, pool=pool)
        self.history = at_least("history", history, window)

    def queries_wanted(self) -> int:
        """Return of how many last tokens of a call queries are needed."""
        return self.history

    def first(self, keys: Tensor) -> dict[str, Tensor]:
        """Start at zero."""
        zero = torch.zeros(keys.shape[:-1], device=keys.device)
        return {"attention": zero, "chances": zero.clone()}

    def watch(self) -> None:
        """Add the weights of this call's queries."""
        if self.fresh is None:
            return
        count, length = self.fresh.shape[-2], self.keys.shape[-2]
        self.per_entry["attention"] += weights(self.fresh, self.keys, self.scaling)
        left = torch.arange(length, 0, -1, device=self.keys.device)
        self.per_entry["chances"] += left.clamp(max=count)
