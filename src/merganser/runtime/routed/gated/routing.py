"""What all gates do: read tokens, score tasks, and turn the scores into weights, while a model of transformers runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ....errors import NotFoundError, UnsupportedError
from ...libraries import cache_utils
from .settings import GateSettings

__all__ = ["Gates", "Look", "Routing", "cache_in"]

Look = Callable[[str, Tensor], None]
"""Gets a site, and what its gate reads, shape [tokens, features], without padding."""

_SHARED = "all"


@dataclass
class Gates:
    """A linear gate per site, or one for all.

    Args:
        weights: By site, or under one name for all; shape [tasks, features], float32.
        biases: The same, shape [tasks].
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def parameters(self) -> list[Tensor]:
        """Return what is trained."""
        return [*self.weights.values(), *self.biases.values()]


@dataclass
class _Text:
    """The rows that pass through the model, and what is remembered of them while text is generated.

    Args:
        mask: Which tokens of the present call are no padding, shape [rows, length].
        seen: Number of tokens in the key-value cache, with those of the present call.
        gates: Weights by site, in the present call.
        total: By site, sums of the scores of the tokens so far, shape [rows, 1, tasks]; for "text", their means.
        count: By site, numbers of tokens so far, shape [rows, 1, 1].
    """

    mask: Tensor
    seen: int
    gates: dict[str, Tensor] = field(default_factory=dict)
    total: dict[str, Tensor] = field(default_factory=dict)
    count: dict[str, Tensor] = field(default_factory=dict)

    def reorder(self, rows: Tensor) -> None:
        """Put the rows into another order, in which some may be there twice and others missing."""
        for kept in (self.total, self.count):
            for site, own in kept.items():
                kept[site] = own.index_select(0, rows.to(own.device))


class Routing:
    """The gates of a model, without what they weight.

    Args:
        model: A causal language model of transformers; it gets hooks.
        settings: What gates read, and how scores become weights.
        tasks: Number of tasks.

    Attributes:
        count: Number of linear layers, or of modules, that gates act on.
        widths: By site, how many features its gate reads.
        told: Weights of the tasks that replace those of the gates; None where the gates decide.
        look: Gets what every gate reads; None where nobody looks.
        noted: Mean weights of each row by site, shape [rows, tasks]; None where nobody asks for them.
    """

    def __init__(self, model: Any, settings: GateSettings, tasks: int) -> None:
        self.settings, self.tasks = settings, tasks
        self.count = 0
        self.widths: dict[str, int] = {}
        self.gates: Gates | None = None
        self.told: Tensor | None = None
        self.look: Look | None = None
        self.noted: dict[str, Tensor] | None = None
        self._text: _Text | None = None
        model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.base_model.register_forward_hook(self._end)

    def key(self, site: str) -> str:
        """Return under which name the gate of a site is kept."""
        return _SHARED if self.settings.shared else site

    def keys(self) -> dict[str, int]:
        """Return the names of what is fitted, and how many features each reads."""
        if self.settings.reads == "projection":
            return {}
        return {self.key(site): width for site, width in self.widths.items()}

    def zeros(self) -> Gates:
        """Return gates whose scores are zero."""
        found = Gates()
        for key, width in self.keys().items():
            found.weights[key] = torch.zeros(self.tasks, width)
            found.biases[key] = torch.zeros(self.tasks)
        return found

    def tell(self, task: int | None) -> None:
        """Give all weight to one task (None: to none) instead of asking the gates, until `ask`."""
        self.told = torch.zeros(self.tasks)
        if task is not None:
            self.told[task] = 1.0

    def ask(self) -> None:
        """Let the gates decide again."""
        self.told = None

    def _check_widths(self) -> None:
        """Refuse one gate for sites that read different numbers of features."""
        if self.settings.shared and len(set(self.widths.values())) > 1:
            few, many = min(self.widths, key=self.widths.__getitem__), max(self.widths, key=self.widths.__getitem__)
            raise UnsupportedError(
                f"one gate for all needs sites that read the same: {few} reads {self.widths[few]} features, {many} "
                f"{self.widths[many]}; give each its own (shared: false)"
            )

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what is passed to the model: which tokens are padding, and which are in its cache already."""
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        assert given is not None
        rows, length = given.shape[:2]
        cache = cache_in(args, kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is None:
            mask = torch.ones(rows, length, dtype=torch.bool, device=given.device)
        elif isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask[:, -length:].bool()
        else:
            raise UnsupportedError(
                "gates need an attention mask of the shape [rows, length], or none; a static cache makes another one"
            )
        before = self._text
        if past == 0 or before is None or self.settings.pool == "token":
            self._text = _Text(mask, past + length)
            return
        if before.seen != past or len(before.mask) != rows:
            raise UnsupportedError(
                f"gates have seen {before.seen} tokens of {len(before.mask)} rows, and the cache holds {past} of {rows}: it "
                "cannot be used for other rows or be shortened, as assisted decoding does"
            )
        self._text = _Text(mask, past + length, {}, before.total, before.count)

    def _end(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Let what is remembered change places with the rows of the key-value cache, as it does in beam search."""
        cache = getattr(output, "past_key_values", None)
        if cache is None or self.settings.pool == "token" or "reorder_cache" in vars(cache):
            return
        moved = cache.reorder_cache

        def reorder(rows: Tensor) -> None:
            moved(rows)
            self._running().reorder(rows)

        cache.reorder_cache = reorder

    def _show(self, site: str, x: Tensor) -> None:
        """Let somebody look at the input of a site, shape [..., features], without padding."""
        if self.look is not None:
            self.look(site, x.reshape(-1, x.shape[-1])[self._running().mask.flatten()])

    def _scores_of(self, site: str, read: Tensor) -> Tensor:
        """Return the scores of the tasks for what a gate reads, shape [..., tasks], float32.

        Raises:
            NotFoundError: There are no gates.
        """
        if self.gates is None:
            raise NotFoundError("there are no gates yet; make them from text with fit()")
        key = self.key(site)
        return linear(read.float(), self.gates.weights[key].to(read.device), self.gates.biases[key].to(read.device))

    def _decide(self, site: str, scores: Tensor) -> Tensor:
        """Turn the scores of a site, shape [rows, length, tasks], into weights; keep them for the rest of the call."""
        text = self._running()
        found = self._shares(site, self._pooled(site, scores))
        text.gates[site] = found
        if self.noted is not None:
            kept = text.mask.unsqueeze(-1)
            self.noted[site] = (found * kept).sum(1) / kept.sum(1).clamp_min(1)
        return found

    def _pooled(self, site: str, scores: Tensor) -> Tensor:
        """Return the mean scores of the tokens that count for each token, shape [rows, length, tasks]."""
        text, pool = self._running(), self.settings.pool
        if pool == "token":
            return scores
        kept = text.mask.unsqueeze(-1).to(scores.dtype)
        if pool == "text":
            if site not in text.total:
                text.total[site] = (scores * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
            return text.total[site].expand_as(scores)
        total, count = (scores * kept).cumsum(1), kept.cumsum(1)
        if site in text.total:
            total, count = total + text.total[site], count + text.count[site]
        text.total[site], text.count[site] = total[:, -1:], count[:, -1:]
        return total / count.clamp_min(1)

    def _top(self, site: str) -> int | None:
        """Return how many weights of a site stay; None for all."""
        return self.settings.top

    def _shares(self, site: str, scores: Tensor) -> Tensor:
        """Return the weights that belong to scores."""
        top, weights = self._top(site), self.settings.weights
        kept = None
        if top is not None and top < self.tasks:
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(top, -1).indices, True)
        if kept is not None and weights == "top_softmax":
            found = scores.masked_fill(~kept, -torch.inf).softmax(-1)
            if top == 1 and scores.requires_grad:
                # a weight of 1 has no gradient: in training it gets that of the softmax over all tasks
                soft = scores.softmax(-1)
                found = found.detach() + (soft - soft.detach())
            return found
        found = scores if weights == "scores" else scores.softmax(-1)
        return found if kept is None else found * kept

    def _running(self) -> _Text:
        assert self._text is not None
        return self._text


def cache_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the key-value cache among the arguments of a call; None if there is none."""
    kind = cache_utils().Cache
    return next((each for each in (*args, *kwargs.values()) if isinstance(each, kind)), None)
