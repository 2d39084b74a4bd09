"""SnapKV: what the last queries of the prompt attend to (Li et al. 2024)."""

from __future__ import annotations

from ..layer import ScoredLayer

__all__ = ["SnapKV"]


class SnapKV(ScoredLayer):
    """Keep the entries that the last `window` queries attend to most, with their neighbours.

        score_t = max over |u - t| <= pool // 2 of sum over the last queries of softmax(q k_u)

    Differs from the paper:
        Query heads that share a key head are averaged. The paper compresses once, after the prompt; here the budget holds
        while text is generated, too.

    Args:
        budget: Entries per layer and head.
        sinks: First tokens that stay.
        window: Last tokens that stay and whose queries vote.
        pool: Width of the maximum over neighbours, an odd number.
    """

    def __init__(self, *, budget: int, sinks: int = 4, window: int = 32, pool: int = 5):
        super().__init__(budget=budget, sinks=sinks, window=window, pool=pool)

    def compress(self) -> None:
        """Drop the entries of the lowest scores."""
        self.keep(self.best(self.pooled(self.window_scores())))
