"""EMS: evict, then merge, with a global and a local score (Li et al. 2024)."""

from __future__ import annotations

import torch

from ...errors import ParameterError
from ..layer import taken
from ..merging import fold, nearest, shares
from ..options import in_range
from .accumulated import AccumulatedLayer

__all__ = ["EMS"]


class EMS(AccumulatedLayer):
    """Keep the entries of the highest score; merge each other one into the most similar key, or drop it.

        score = g / max g + l / max l
        g: attention weights so far over the number of queries that could see the token; l: those of the last queries

    An entry whose highest cosine is above `similarity` joins that entry by a mean weighted with the scores; one below it
    is dropped, which lets all heads hold the same number of entries.

    Differs from the paper:
        Written from the paper's description; the authors published no code that was compared. Attention is summed over the
        last `history` queries of each call.

    Args:
        budget: Entries per layer and head.
        sinks: First tokens that stay.
        window: Last tokens that stay and whose queries give the local score.
        pool: Entries of which the highest score counts for the middle one, when it is chosen; 1 is our reading of the paper.
        history: Queries per call whose attention is summed.
        similarity: Least cosine for merging, from -1 to 1.
        merge_keys: Merge keys too; otherwise values alone, so that no key mixes two positions.
    """

    def __init__(
        self,
        *,
        budget: int,
        sinks: int = 4,
        window: int = 32,
        pool: int = 1,
        history: int = 512,
        similarity: float = 0.6,
        merge_keys: bool = True,
    ):
        super().__init__(budget=budget, sinks=sinks, window=window, pool=pool, history=history)
        self.similarity = in_range("similarity", similarity, -1, 1, what="cosine")
        if not isinstance(merge_keys, bool):
            raise ParameterError(f"merge_keys: must be true or false, not {merge_keys!r}")
        self.merge_keys = merge_keys

    def compress(self) -> None:
        """Merge or drop the entries of the lowest scores."""
        everywhere = self.per_entry["attention"] / self.per_entry["chances"].clamp(min=1)
        here = self.window_scores()
        score = everywhere / everywhere.amax(-1, keepdim=True) + here / here.amax(-1, keepdim=True)
        kept = self.best(self.pooled(score))
        gone = self.others(kept)
        keys, values = taken(self.keys, gone), taken(self.values, gone)
        self.keep(kept)
        cosine, target = nearest(keys, self.keys)
        merged = torch.where(cosine > self.similarity, score.gather(-1, gone), 0.0)
        own, other = shares(score.gather(-1, kept), merged, target)
        self.values = fold(self.values, values, own, other, target)
        if self.merge_keys:
            self.keys = fold(self.keys, keys, own, other, target)
