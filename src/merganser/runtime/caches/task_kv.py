"""Task-KV: heads whose outputs differ most from the others' keep everything, the others little (He et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ..attention import outputs, weights
from ..layer import taken
from ..merging import highest
from ..options import at_least, in_range, part
from .uneven import UnevenLayer, by_order

__all__ = ["TaskKV", "distances"]


class TaskKV(UnevenLayer):
    """Keep all tokens of heterogeneous heads; of other heads sinks, the last tokens, and the most attended ones between.

        s_h = W_h mean over the last queries of sum_t softmax(q k_t) v_t,   c = mean_h s_h,   d_h = |s_h - c|

    W_h are the columns of the output projection that belong to head h. The heads of the largest distance d_h from the
    semantic centre c are heterogeneous. They are chosen for each text, in every layer, at the end of the first call that
    leaves more than `sinks` + `middle` + `window` tokens; later calls keep the choice. In the other heads the entries
    between that the last `window` queries attend to most stay, the middle activations.

    There is no budget: what is held grows with the text in heterogeneous heads.

    Differs from the paper:
        Written from its abstract and formulas; no code of the authors was compared, and `share` and `middle` are
        defaults of ours. The unit is a key head: with grouped queries its distance is the largest of its query heads.

    Args:
        share: Share of the key heads of a layer that are heterogeneous, from 0 to 1; rounded, half up.
        sinks: First tokens that stay in all heads.
        middle: Entries between that stay in the other heads.
        window: Last tokens that stay in all heads, and whose queries give the scores.
    """

    def __init__(self, *, share: float = 0.4, sinks: int = 4, middle: int = 64, window: int = 32):
        super().__init__()
        self.share = in_range("share", share, 0, 1)
        self.sinks, self.middle = at_least("sinks", sinks, 0), at_least("middle", middle, 0)
        self.window = at_least("window", window, 1)
        self.projection: Callable[[Tensor], Tensor] | None = None

    def meet(self, attention: Any) -> None:
        """Take the output projection, whose columns belong to heads."""
        self.projection = attention.o_proj

    def queries_wanted(self) -> int:
        """Return of how many last tokens of a call queries are needed."""
        return self.window

    def observe(self, queries: Tensor, scaling: float) -> None:
        """Take the queries of a call, before its keys are added: shape [batch, query heads, tokens, head_dim]."""
        self.scaling = scaling
        both = queries if self.queries is None else torch.cat((self.queries, queries), dim=-2)
        self.queries = both[:, :, -self.window :]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add a call's keys and values, return what its attention sees, and drop what is far in most heads."""
        self.seen += key_states.shape[-2]
        if self.order is None:
            found = super().update(key_states, value_states, *args, **kwargs)
        else:
            self.append(key_states, value_states)
            found = self.together("keys"), self.together("values")
        with torch.no_grad():
            if self.order is None and self.seen > self.sinks + self.middle + self.window:
                self._choose()
            if self.order is not None:
                self._drop()
        return found[0], found[1]

    def _choose(self) -> None:
        """Find the heterogeneous heads, and part the heads."""
        if self.queries is None or self.projection is None:
            raise UnsupportedError("TaskKV: heads are told apart by the queries of a model, which MergedCache collects")
        mean = outputs(self.queries, self.keys, self.values, self.scaling).to(self.queries.dtype)
        distance = distances(mean, self.projection).reshape(*self.keys.shape[:2], -1).amax(-1)
        order = distance.argsort(dim=-1, descending=True, stable=True)
        self.part(self.keys, self.values, order, (part(2 * self.keys.shape[1], self.share) + 1) // 2)
        self.keys = self.values = self.keys.new_zeros(0)

    def _drop(self) -> None:
        """Drop the least attended entries between sinks and window of the heads that are not heterogeneous."""
        near, most = self.held["near keys"], self.sinks + self.middle + self.window
        if near.shape[-2] <= most or not near.shape[1]:
            # where all heads are heterogeneous, nothing may count as near
            return
        assert self.queries is not None
        assert self.order is not None
        count = self.held["whole keys"].shape[1]
        by_head = self.queries.reshape(*self.order.shape, -1, *self.queries.shape[-2:])
        queries = by_order(by_head, self.order)[:, count:].flatten(1, 2)
        score = weights(queries, near, self.scaling)
        length = near.shape[-2]
        score[..., : self.sinks] = float("inf")
        score[..., length - self.window :] = float("inf")
        kept = highest(score, most).sort().values
        for name in ("near keys", "near values"):
            self.held[name] = taken(self.held[name], kept)


def distances(mean: Tensor, projection: Callable[[Tensor], Tensor]) -> Tensor:
    """Return how far the projected outputs of heads are from their mean, Euclidean: shape [batch, query heads], float32.

    Args:
        mean: Outputs of heads before the projection, shape [batch, query heads, head_dim].
        projection: Takes [..., query heads * head_dim] to [..., hidden size]; called, so that adapters and quantised weights
            count.
    """
    # each head alone, the others 0; a bias is the same for all, and falls out
    said = projection(torch.diag_embed(mean.movedim(1, -1)).permute(0, 2, 3, 1).flatten(2)).float()
    distance: Tensor = (said - said.mean(1, keepdim=True)).norm(dim=-1)
    return distance
