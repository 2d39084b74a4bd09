"""KVMerger: neighbours with similar keys become one entry (Wang et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...errors import ParameterError
from ..layer import ScoredLayer, taken
from ..merging import highest
from ..options import in_range, part

__all__ = ["KVMerger"]


class KVMerger(ScoredLayer):
    """Merge runs of neighbours with similar keys around the one that is attended to most.

        w_i = c_i g_i / sum c_j g_j,  g_i = exp(-|k_p - k_i|^2 / (2 s^2)),  s^2 = mean over the run of |k_p - k_i|^2
        k* = sum w_i k_i,  v* = sum w_i v_i,  c* = sum c_i

    p is the entry of the run with the most attention from the last queries, c_i the number of tokens that entry i stands
    for. Sinks, window, and the entries with the most attention (`heavy`) are merged with nothing. As many neighbours are
    joined, the most similar first, as the budget demands, so the threshold of similarity follows from the budget.

    Differs from the paper:
        The paper fixes the threshold of similarity (0.75), and so has no budget; here it is the other way round. The
        paper multiplies a merged value by the number of its tokens, which leaves the sum of the softmax short of them
        (`mass="values"`); the default adds log c to the logit, so that c equal tokens count c times. Its bandwidth is
        defined by itself; here it is the mean squared distance.

    Args:
        budget: Entries per layer and head.
        sinks: First tokens that stay.
        window: Last tokens that stay and whose queries choose the pivots.
        pool: Entries of which the highest score counts for the middle one, when `heavy` ones are chosen; 1 in the paper.
        heavy: Share of the other places for entries that are merged with nothing, from 0 to 0.5.
        mass: How an entry stands for several tokens: `logits` adds log c to its logit, `values` multiplies its value by c.
    """

    def __init__(
        self,
        *,
        budget: int,
        sinks: int = 4,
        window: int = 32,
        pool: int = 1,
        heavy: float = 0.25,
        mass: str = "logits",
    ):
        super().__init__(budget=budget, sinks=sinks, window=window, pool=pool)
        in_range("heavy", heavy, 0, 0.5)
        if mass not in ("logits", "values"):
            raise ParameterError(f"mass: must be 'logits' or 'values', not {mass!r}")
        # h entries cut what may be merged into at most h + 1 runs, each of which leaves one entry: 2 h + 1 must fit
        free = budget - sinks - window
        self.heavy, self.mass = min(part(free, heavy), (free - 1) // 2), mass

    def first(self, keys: Tensor) -> dict[str, Tensor]:
        """Count one token per entry."""
        return {"counts": torch.ones(keys.shape[:-1], device=keys.device)}

    def bias(self) -> Tensor | None:
        """Return log c, once something was merged."""
        merged = self.mass == "logits" and self.kept() < self.seen
        return self.per_entry["counts"].log() if merged else None

    def seen_values(self) -> Tensor:
        """Return the values, times c for `mass="values"`."""
        if self.mass == "logits":
            return super().seen_values()
        return (self.values * self.per_entry["counts"][..., None]).to(self.values.dtype)

    def compress(self) -> None:
        """Join as many neighbours as are too many."""
        scores = self.window_scores()
        run = (~self._joined(scores)).cumsum(-1) - 1
        pivot = _pivots(scores, run, self.budget)
        counts = self.per_entry["counts"]
        keys = self.keys.float()
        distance = (keys - taken(keys, pivot.gather(-1, run))).square().sum(-1)
        members = _sums(torch.ones_like(counts), run, self.budget)
        variance = (_sums(distance, run, self.budget) / members).gather(-1, run)
        weight = counts * torch.exp(-distance / (2 * variance).clamp(min=torch.finfo(torch.float32).tiny))
        weight = weight / _sums(weight, run, self.budget).gather(-1, run)
        self.keys = _merged(self.keys, weight, run, self.budget)
        self.values = _merged(self.values, weight, run, self.budget)
        self.per_entry = {"counts": _sums(counts, run, self.budget)}

    def _joined(self, scores: Tensor) -> Tensor:
        """Return which entries join the one before them: bool, shape [batch, key heads, entries]."""
        length = scores.shape[-1]
        free = torch.zeros_like(scores, dtype=torch.bool)
        free[..., self.sinks : length - self.window] = True
        heavy = highest(self.pooled(scores).masked_fill(~free, -1.0), self.heavy)
        free = free.scatter(-1, heavy, False)
        similar = cosine_similarity(self.keys[..., 1:, :].float(), self.keys[..., :-1, :].float(), dim=-1)
        similar = similar.masked_fill(~(free[..., 1:] & free[..., :-1]), float("-inf"))
        nearest = highest(similar, length - self.budget) + 1
        return torch.zeros_like(free).scatter(-1, nearest, True)


def _sums(numbers: Tensor, run: Tensor, runs: int) -> Tensor:
    return numbers.new_zeros(*numbers.shape[:-1], runs).scatter_add(-1, run, numbers)


def _pivots(scores: Tensor, run: Tensor, runs: int) -> Tensor:
    """Return for each run the first entry with its highest score."""
    highest = scores.new_zeros(*scores.shape[:-1], runs).scatter_reduce(-1, run, scores, "amax", include_self=False)
    places = torch.arange(run.shape[-1], device=run.device).expand_as(run)
    places = places.masked_fill(scores < highest.gather(-1, run), run.shape[-1])
    return run.new_zeros(*run.shape[:-1], runs).scatter_reduce(-1, run, places, "amin", include_self=False)


def _merged(tensor: Tensor, weight: Tensor, run: Tensor, runs: int) -> Tensor:
    sums = torch.zeros(*tensor.shape[:-2], runs, tensor.shape[-1], device=tensor.device)
    return sums.scatter_add(-2, run[..., None].expand_as(tensor), tensor.float() * weight[..., None]).to(tensor.dtype)
