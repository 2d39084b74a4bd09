"""The base of cache layers that hold fewer entries than tokens were seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from ..errors import ParameterError, UnsupportedError
from .attention import weights
from .libraries import cache_utils
from .merging import highest
from .options import at_least

__all__ = ["CompressedLayer", "RunningLayer", "ScoredLayer", "taken"]


class RunningLayer(cache_utils().DynamicLayer):  # type: ignore[misc]
    """A layer that holds something else than the keys and values of all tokens, with the interface of transformers.

    Keys and values have the shape [batch, key heads, entries, head_dim]; keys are rotated. Entries stay in the order of
    their tokens.
    """

    keys: Tensor
    values: Tensor
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Start with no entries; transformers 4 gives keys alone."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states.new_empty(0), key_states.new_empty(0)
        self.is_initialized = True

    def _clear(self) -> None:
        self.seen = 0
        self.scaling = 1.0
        self.queries: Tensor | None = None
        self.fresh: Tensor | None = None
        self.per_entry: dict[str, Tensor] = {}

    @classmethod
    def build(cls, layers: int, options: dict[str, Any]) -> list[Any]:
        """Return the layers of a model's cache."""
        return [cls(**options) for _ in range(layers)]

    def meet(self, attention: Any) -> None:
        """Take what the method needs of the layer's attention module, before each call."""

    def queries_wanted(self) -> int:
        """Return of how many last tokens of a call queries are needed."""
        return 0

    def observe(self, queries: Tensor, scaling: float) -> None:
        """Take the queries of a call, before its keys are added: shape [batch, query heads, tokens, head_dim]."""

    def bias(self) -> Tensor | None:
        """Return what is added to the logits of the entries, shape [batch, key heads, entries]; None if nothing is."""
        return None

    def kept(self) -> int:
        """Return the number of entries."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, from which models derive positions."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return how many keys attention will see, and how many tokens before them are gone.

        Args:
            query_length: Number of new tokens; transformers 4 gives their places, shape [new].
        """
        new = len(query_length) if isinstance(query_length, Tensor) else query_length
        return self.kept() + new, self.seen - self.kept()

    def rows(self) -> int:
        """Return the rows of the batch that are held, 0 if nothing is."""
        return next((each.shape[0] for each in self._held().values()), 0)

    def stored_bytes(self) -> int:
        """Return the bytes of everything that is held per entry."""
        return sum(each.numel() * each.element_size() for each in self._held().values())

    def _held(self) -> dict[str, Tensor]:
        """Return what grows with the entries."""
        return {"keys": self.keys, "values": self.values, **self.per_entry} if self.kept() else {}

    def _batched(self) -> list[str]:
        """Return the attributes whose first axis is the batch."""
        return [name for name in ("keys", "values", "queries") if isinstance(getattr(self, name), Tensor)]

    def _rows(self, change: Any) -> None:
        """Apply a change of the batch's rows to all that is held."""
        for name in self._batched():
            setattr(self, name, change(getattr(self, name)))
        self.per_entry = {name: change(each) for name, each in self.per_entry.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows of the batch."""
        if self.kept():
            self._rows(lambda each: each[indices.to(each.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.kept():
            self._rows(lambda each: each.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Forget everything."""
        if self.is_initialized:
            self.lazy_initialization(self.keys)
        self.is_initialized = False
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to go back: what was merged cannot be taken apart.

        Args:
            tokens_to_remove: At most 0; transformers 4 gives the number of tokens that stay, above 0.
        """
        back = max(self.seen - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
        if back:
            raise UnsupportedError(
                f"{type(self).__name__}: a compressed cache cannot go back {back} tokens, as assisted and contrastive "
                "decoding do; use greedy decoding, sampling or beam search"
            )


class CompressedLayer(RunningLayer):
    """A layer whose attention sees everything of the current call, and which holds at most `budget` entries after it.

    Subclasses define `compress`, and hold more per entry in `per_entry`.

    Args:
        budget: Entries per layer and head after a call.
        sinks: First tokens, which always stay as they are.
        window: Last tokens, which always stay as they are.
    """

    def __init__(self, *, budget: int, sinks: int = 4, window: int = 32):
        super().__init__()
        self.sinks, self.window = at_least("sinks", sinks, 0), at_least("window", window, 1)
        self.budget = at_least("budget", budget, 1)
        if budget <= sinks + window:
            raise ParameterError(
                f"budget: {budget} entries leave no room beside {sinks} sinks and a window of {window}; "
                f"the least is {sinks + window + 1}"
            )

    # what a method defines

    def compress(self) -> None:
        """Bring the entries down to `budget`."""
        raise NotImplementedError

    def watch(self) -> None:
        """Look at the queries of a call (`fresh`) when its keys have been added."""

    def first(self, keys: Tensor) -> dict[str, Tensor]:
        """Return what `per_entry` holds of new keys, each of the shape [batch, key heads, new]."""
        return {}

    def seen_values(self) -> Tensor:
        """Return the values as attention gets them."""
        return self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add a call's keys and values, return all that its attention sees, and compress what stays."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append(key_states, value_states)
        self.seen += key_states.shape[-2]
        seen = self.keys, self.seen_values()
        with torch.no_grad():
            self.watch()
            self.fresh = None
            if self.keys.shape[-2] > self.budget:
                self.compress()
        return seen

    def _append(self, keys: Tensor, values: Tensor) -> None:
        self.keys = torch.cat((self.keys, keys), dim=-2) if self.keys.numel() else keys
        self.values = torch.cat((self.values, values), dim=-2) if self.values.numel() else values
        for name, new in self.first(keys).items():
            old = self.per_entry.get(name)
            self.per_entry[name] = new if old is None else torch.cat((old, new), dim=-1)

    # what methods share

    def best(self, scores: Tensor) -> Tensor:
        """Return the entries that stay, in their order: sinks, window, and those of the highest scores in between.

        Args:
            scores: Shape [batch, key heads, entries].

        Returns:
            Indices, shape [batch, key heads, budget].
        """
        length = scores.shape[-1]
        inner = scores[..., self.sinks : length - self.window]
        chosen = highest(inner, self.budget - self.sinks - self.window).sort().values + self.sinks
        first = torch.arange(self.sinks, device=scores.device).expand(*scores.shape[:2], -1)
        last = torch.arange(length - self.window, length, device=scores.device).expand(*scores.shape[:2], -1)
        return torch.cat((first, chosen, last), dim=-1)

    def others(self, kept: Tensor) -> Tensor:
        """Return the indices of the entries that do not stay, in their order."""
        gone = torch.ones(self.keys.shape[:-1], dtype=torch.bool, device=kept.device).scatter(-1, kept, False)
        every = torch.arange(gone.shape[-1], device=kept.device).expand_as(gone)
        return every[gone].reshape(*gone.shape[:2], -1)

    def keep(self, kept: Tensor) -> None:
        """Drop all other entries."""
        self.keys, self.values = taken(self.keys, kept), taken(self.values, kept)
        self.per_entry = {name: each.gather(-1, kept) for name, each in self.per_entry.items()}


class ScoredLayer(CompressedLayer):
    """A compressed layer whose entries are scored by what the last queries attend to.

    Args:
        budget: Entries per layer and head after a call.
        sinks: First tokens, which always stay as they are.
        window: Last tokens, which always stay as they are, and whose queries give scores.
        pool: Entries around the middle of which the highest score counts for it when it is chosen, an odd number. A query
            attends to where a name or number begins; its other tokens must stay with it.
    """

    def __init__(self, *, budget: int, sinks: int = 4, window: int = 32, pool: int = 1):
        super().__init__(budget=budget, sinks=sinks, window=window)
        self.pool = at_least("pool", pool, 1)
        if pool % 2 == 0:
            raise ParameterError(f"pool: must be odd, so that it has a middle, not {pool}")

    def queries_wanted(self) -> int:
        """Return of how many last tokens of a call queries are needed."""
        return self.window

    def observe(self, queries: Tensor, scaling: float) -> None:
        """Take the queries of a call, before its keys are added: shape [batch, query heads, tokens, head_dim]."""
        self.fresh, self.scaling = queries, scaling
        both = queries if self.queries is None else torch.cat((self.queries, queries), dim=-2)
        self.queries = both[:, :, -self.window :]

    def window_scores(self) -> Tensor:
        """Return the sum of attention weights from the last queries, shape [batch, key heads, entries]."""
        if self.queries is None:
            raise UnsupportedError(
                f"{type(self).__name__}: scores need the queries of a model, which MergedCache collects"
            )
        return weights(self.queries, self.keys, self.scaling, self.bias())

    def pooled(self, scores: Tensor) -> Tensor:
        """Return the highest score of the `pool` entries around each, shape [batch, key heads, entries]."""
        # the window's own weights must not spread to the entries before it
        before = scores.index_fill(-1, torch.arange(scores.shape[-1], device=scores.device)[-self.window :], 0)
        return max_pool1d(before, self.pool, stride=1, padding=self.pool // 2)


def taken(tensor: Tensor, index: Tensor) -> Tensor:
    """Return entries: of shape [batch, heads, entries, d] at [batch, heads, n]."""
    return tensor.gather(-2, index[..., None].expand(-1, -1, -1, tensor.shape[-1]))
