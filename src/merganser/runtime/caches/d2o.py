"""D2O: tokens that go are merged into similar ones if they are similar enough (Wan et al. 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layer import taken
from ..merging import fold, nearest, shares
from ..options import in_range
from .accumulated import AccumulatedLayer

__all__ = ["D2O"]


class D2O(AccumulatedLayer):
    """Keep heavy hitters and recent tokens; merge each other token into the most similar one, above a moving threshold.

        u_i = max_j cos(k_i, k_j),   tau = mean_i u_i at first, then beta mean_i u_i + (1 - beta) tau
        w_i = exp(u_i) [u_i >= tau] / (e + sum over those merged into j),   w_j = e / (the same)

    Keys and values are merged with the same weights, which add up to 1.

    Differs from the paper:
        All layers have the same budget; the paper gives more to layers with even attention. The threshold is one per head,
        where the authors' code averages over heads, although each head drops other tokens. Attention is summed over the
        last `history` queries of each call.

    Args:
        budget: Entries per layer and head.
        sinks: First tokens that stay.
        window: Last tokens that stay.
        pool: Entries of which the highest sum counts for the middle one; 1 in the paper.
        history: Queries per call whose attention is summed.
        beta: Share of the newest similarities in the threshold, above 0 and up to 1.
    """

    def __init__(
        self,
        *,
        budget: int,
        sinks: int = 4,
        window: int = 32,
        pool: int = 1,
        history: int = 512,
        beta: float = 0.7,
    ):
        super().__init__(budget=budget, sinks=sinks, window=window, pool=pool, history=history)
        self.beta = in_range("beta", beta, 0, 1, above=True)

    def _clear(self) -> None:
        super()._clear()
        self.threshold: Tensor | None = None

    def _batched(self) -> list[str]:
        return super()._batched() + (["threshold"] if self.threshold is not None else [])

    def compress(self) -> None:
        """Merge or drop the entries of the lowest sums."""
        kept = self.best(self.pooled(self.per_entry["attention"]))
        gone = self.others(kept)
        keys, values = taken(self.keys, gone), taken(self.values, gone)
        self.keep(kept)
        cosine, target = nearest(keys, self.keys)
        mean = cosine.mean(-1, keepdim=True)
        self.threshold = mean if self.threshold is None else self.beta * mean + (1 - self.beta) * self.threshold
        other = torch.where(cosine >= self.threshold, cosine.exp(), 0.0)
        own, other = shares(torch.full(kept.shape, math.e, device=keys.device), other, target)
        self.keys = fold(self.keys, keys, own, other, target)
        self.values = fold(self.values, values, own, other, target)
