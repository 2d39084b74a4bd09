"""Task-KV: heads that say something else than most keep everything, the others little (He et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import ParameterError, UnsupportedError
from ..attention import outputs, weights
from ..layer import RunningLayer, at_least, taken

__all__ = ["TaskKV", "distances"]


class TaskKV(RunningLayer):
    """Keep all tokens of heterogeneous heads; of other heads sinks, the last tokens, and the most attended ones between.

        s_h = W_h mean over the last queries of sum_t softmax(q k_t) v_t,   c = mean_h s_h,   d_h = |s_h - c|

    W_h are the columns of the output projection that belong to head h. The heads of the largest distance d_h from the
    semantic centre c are heterogeneous. They are chosen for each text, in every layer, at the end of the first call that
    leaves more than `sinks` + `middle` + `window` tokens; later calls keep the choice. In the other heads the entries
    between that the last `window` queries attend to most stay, the middle activations.

    There is no budget: what is held grows with the text in heterogeneous heads. Keys and values of all heads are put
    together for each call, and exist as one tensor, with padding, in one layer at a time.

    Differs from the paper:
        Written from its abstract and formulas; no code of the authors was compared, and `share` and `middle` are
        defaults of ours. The unit is a key head: with grouped queries its distance is the largest of its query heads.

    Args:
        share: Share of the key heads of a layer that are heterogeneous, from 0 to 1; rounded, half up.
        sinks: First tokens that stay in all heads.
        middle: Entries between that stay in the other heads.
        window: Last tokens that stay in all heads, and whose queries are asked.
    """

    def __init__(self, *, share: float = 0.4, sinks: int = 4, middle: int = 64, window: int = 32):
        super().__init__()
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share <= 1:
            raise ParameterError(f"share: must be a number from 0 to 1, not {share!r}")
        self.share = share
        self.sinks, self.middle = at_least("sinks", sinks, 0), at_least("middle", middle, 0)
        self.window = at_least("window", window, 1)
        self.projection: Tensor | None = None

    def _clear(self) -> None:
        super()._clear()
        # heads by distance, heterogeneous ones first, shape [batch, key heads]; None before they are chosen
        self.order: Tensor | None = None
        self.held: dict[str, Tensor] = {}

    def meet(self, attention: Any) -> None:
        """Take the output projection, whose columns belong to heads."""
        self.projection = attention.o_proj.weight

    def queries_wanted(self) -> int:
        """Return of how many last tokens of a call queries are needed."""
        return self.window

    def observe(self, queries: Tensor, scaling: float) -> None:
        """Take the queries of a call, before its keys are added: shape [batch, query heads, tokens, head_dim]."""
        self.scaling = scaling
        both = queries if self.queries is None else torch.cat((self.queries, queries), dim=-2)
        self.queries = both[:, :, -self.window :]

    def kept(self) -> int:
        """Return the entries that attention sees of the tokens so far, in the heads that have most."""
        if self.order is None:
            return super().kept()
        return int(self.held["whole keys" if self.held["whole keys"].shape[1] else "near keys"].shape[-2])

    def bias(self) -> Tensor | None:
        """Return what hides the padding of heads that dropped tokens."""
        if self.order is None or self.held["near keys"].shape[-2] == self.kept() or not self.held["near keys"].shape[1]:
            return None
        whole, near = (self.held[f"{name} keys"].shape[1] for name in ("whole", "near"))
        bias = self.keys.new_zeros(len(self.order), whole + near, self.kept(), dtype=torch.float32)
        bias[:, whole:, : self.kept() - self.held["near keys"].shape[-2]] = float("-inf")
        return self._by_head(bias)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add a call's keys and values, return what its attention sees, and drop what is far in most heads."""
        self.seen += key_states.shape[-2]
        if self.order is None:
            found = super().update(key_states, value_states, *args, **kwargs)
        else:
            self._append(key_states, value_states)
            found = self._together("keys"), self._together("values")
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
        mean = outputs(self.queries, self.keys, self.values, self.scaling)
        distance = distances(mean, self.projection).reshape(*self.keys.shape[:2], -1).amax(-1)
        self.order = distance.argsort(dim=-1, descending=True, stable=True)
        count = int(self.share * self.keys.shape[1] + 0.5)
        for name, states in (("keys", self.keys), ("values", self.values)):
            sorted_ = _heads(states, self.order)
            self.held[f"whole {name}"] = sorted_[:, :count].contiguous()
            self.held[f"near {name}"] = sorted_[:, count:].contiguous()
        self.keys = self.values = self.keys.new_zeros(0)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        assert self.order is not None
        count = self.held["whole keys"].shape[1]
        for name, new in (("keys", keys), ("values", values)):
            sorted_ = _heads(new, self.order)
            for part, some in (("whole", sorted_[:, :count]), ("near", sorted_[:, count:])):
                self.held[f"{part} {name}"] = torch.cat((self.held[f"{part} {name}"], some), dim=-2)

    def _together(self, name: str) -> Tensor:
        """Return all heads in the model's order, shape [batch, key heads, entries, d]: near ones end with the last token."""
        whole, near = self.held[f"whole {name}"], self.held[f"near {name}"]
        if not whole.shape[1]:
            return self._by_head(near)
        padding = near.new_zeros(*near.shape[:2], whole.shape[-2] - near.shape[-2], near.shape[-1])
        return self._by_head(torch.cat((whole, torch.cat((padding, near), dim=-2)), dim=1))

    def _by_head(self, sorted_: Tensor) -> Tensor:
        """Bring heads from the order of their distances into that of the model."""
        assert self.order is not None
        return _heads(sorted_, self.order.argsort(-1))

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
        queries = _heads(by_head, self.order)[:, count:].flatten(1, 2)
        score = weights(queries, near, self.scaling)
        length = near.shape[-2]
        score[..., : self.sinks] = float("inf")
        score[..., length - self.window :] = float("inf")
        kept = score.topk(most).indices.sort().values
        for name in ("near keys", "near values"):
            self.held[name] = taken(self.held[name], kept)

    def _held(self) -> dict[str, Tensor]:
        return super()._held() if self.order is None else self.held

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.order is None:
            super()._rows(change)
            return
        self.order = change(self.order)
        self.queries = None if self.queries is None else change(self.queries)
        self.held = {name: change(each) for name, each in self.held.items()}


def distances(mean: Tensor, projection: Tensor) -> Tensor:
    """Return how far the projected outputs of heads are from their mean, Euclidean: shape [batch, query heads], float32.

    Args:
        mean: Outputs of heads before the projection, shape [batch, query heads, head_dim].
        projection: Shape [hidden size, query heads * head_dim].
    """
    by_head = projection.float().reshape(len(projection), *mean.shape[1:])
    said: Tensor = torch.einsum("bhd,ohd->bho", mean.float(), by_head)
    distance: Tensor = (said - said.mean(1, keepdim=True)).norm(dim=-1)
    return distance


def _heads(states: Tensor, order: Tensor) -> Tensor:
    """Return heads in another order for each row: states [batch, heads, ...], order [batch, heads]."""
    index = order.reshape(*order.shape, *[1] * (states.dim() - 2)).expand_as(states)
    result: Tensor = states.gather(1, index)
    return result
