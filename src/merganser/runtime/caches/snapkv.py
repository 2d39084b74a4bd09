"""SnapKV: what the last queries of the prompt attend to (Li et al. 2024)."""

from __future__ import annotations

from torch.nn.functional import max_pool1d

from ...errors import ParameterError
from ..layer import CompressedLayer
from ..options import at_least

__all__ = ["SnapKV"]


class SnapKV(CompressedLayer):
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
        super().__init__(budget=budget, sinks=sinks, window=window)
        self.pool = at_least("pool", pool, 1)
        if pool % 2 == 0:
            raise ParameterError(f"pool: must be odd, so that it has a middle, not {pool}")

    def compress(self) -> None:
        """Drop the entries of the lowest scores."""
        scores = self.window_scores()
        # the window's own weights must not spread to the entries before it
        scores[..., -self.window :] = 0
        self.keep(self.best(max_pool1d(scores, self.pool, stride=1, padding=self.pool // 2)))
