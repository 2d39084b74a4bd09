"""Which heads look far back: measured once per model, and kept as a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import DataError, OutputError
from ..jsonfile import os_reason, read_object
from .attention import chunks, probabilities
from .cache import MergedCache
from .libraries import cache_argument
from .merging import highest
from .options import at_least, in_range, part

__all__ = ["RetrievalHeads", "find_retrieval_heads"]


@dataclass(frozen=True)
class RetrievalHeads:
    """The key heads of each layer that look far back.

    Args:
        key_heads: Number of key heads of a layer.
        layers: For each layer that attends to all tokens, the indices of such heads, in order.
    """

    key_heads: int
    layers: tuple[tuple[int, ...], ...]

    def save(self, file: str | Path) -> None:
        """Write them as JSON.

        Raises:
            OutputError: The file exists, or cannot be written.
        """
        try:
            with Path(file).open("x", encoding="utf-8") as stream:
                stream.write(json.dumps({"key_heads": self.key_heads, "layers": self.layers}) + "\n")
        except OSError as error:
            raise OutputError(f"{file}: {os_reason(error)}") from None

    @classmethod
    def load(cls, file: str | Path) -> RetrievalHeads:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The file is missing, or not JSON.
            DataError: It holds something else.
        """
        found = read_object(Path(file))
        count, layers = found.get("key_heads"), found.get("layers")
        if found.keys() != {"key_heads", "layers"} or not _whole(count) or not isinstance(layers, list):
            raise DataError(
                f"{file}: is not a file of retrieval heads; it must have key_heads and layers, and nothing else"
            )
        for number, heads in enumerate(layers):
            fits = isinstance(heads, list) and all(_whole(each) and each < count for each in heads)
            if not fits or sorted(set(heads)) != heads:
                raise DataError(f"{file}: layer {number}: must be a list of different heads below {count}, in order")
        return cls(count, tuple(tuple(each) for each in layers))


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def find_retrieval_heads(
    model: Any, *, tokens: int = 500, repeats: int = 4, seed: int = 0, induction: float = 0.14, echo: float = 0.01
) -> RetrievalHeads:
    """Measure which heads of a model attend to where the current token was before, or to what came next there.

    Random tokens are repeated. A head's echo score is its attention to earlier places of the same token, its induction
    score that to the token behind each such place, averaged over the queries of all repeats but the first. The heads of the
    highest scores in the whole model are chosen; a key head is chosen if one of the query heads that share it is.

    Source: Tang et al. 2024, "RazorAttention", section 3.2, which takes 2,500 tokens.

    Args:
        model: As for `MergedCache`.
        tokens: Number of random tokens, at least 2.
        repeats: How often they are there, at least 2. The model must take tokens times repeats.
        seed: Seed of the tokens.
        induction: Share of query heads with the highest induction scores, from 0 to 1.
        echo: Share of query heads with the highest echo scores, from 0 to 1.

    Raises:
        ParameterError: An option is out of range.
        UnsupportedError: The model is not supported.
    """
    at_least("tokens", tokens, 2)
    at_least("repeats", repeats, 2)
    for name, share in (("induction", induction), ("echo", echo)):
        in_range(name, share, 0, 1)
    length = tokens * repeats
    cache = MergedCache("snapkv", model, budget=length + length + 5, window=length)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(model.config.vocab_size, (1, tokens), generator=generator).repeat(1, repeats)
    with torch.no_grad():
        model.base_model(text.to(model.device), **{cache_argument(model.base_model): cache})
        scores = torch.stack([_scores(each, tokens) for each in cache.layers if not each.is_sliding], dim=1)
    cache.close()
    layers, key_heads, group = scores.shape[1:]
    chosen = torch.zeros(layers * key_heads * group, dtype=torch.bool)
    for score, share in zip(scores.flatten(1).cpu(), (echo, induction), strict=True):
        chosen[highest(score, part(len(score), share, up=True))] = True
    by_layer = chosen.view(layers, key_heads, group).any(-1)
    return RetrievalHeads(key_heads, tuple(tuple(each.nonzero().flatten().tolist()) for each in by_layer))


def _scores(layer: Any, tokens: int) -> Tensor:
    """Return the echo and the induction score of each query head, shape [2, key heads, group]."""
    length = layer.keys.shape[-2]
    places = torch.arange(length, device=layer.keys.device)
    total: Any = 0
    for some, at in chunks(layer.queries):
        weight = probabilities(some, layer.keys, layer.scaling, None, length - at)[0]
        back = places[at : at + some.shape[-2], None] - places
        counted = (places[at : at + some.shape[-2]] >= tokens)[:, None] & (back > 0)
        same, behind = counted & (back % tokens == 0), counted & ((back + 1) % tokens == 0)
        total = total + torch.stack([(weight * each).sum((-1, -2)) for each in (same, behind)])
    scores: Tensor = total / (length - tokens)
    return scores
