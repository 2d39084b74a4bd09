"""What queries attend to, recomputed: fast attention kernels do not return their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["causal_mask", "chunks", "outputs", "probabilities", "queries_of", "rotated", "weights"]

_AT_ONCE = 64
"""Queries whose weights are in memory at once."""


def queries_of(attention: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], last: int) -> Tensor:
    """Return the rotated queries of the last tokens of a call, shape [batch, heads, last, head_dim].

    Args:
        attention: An attention module of Llama's kind: `q_proj`, perhaps `q_norm`, rotary positions.
        hidden: Its input, shape [batch, tokens, hidden size].
        position_embeddings: Cosines and sines of the tokens' positions, shape [1 or batch, tokens, head_dim].
        last: Number of tokens.
    """
    hidden = hidden[:, -last:]
    queries = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim))
    if getattr(attention, "q_norm", None) is not None:
        queries = attention.q_norm(queries)
    queries = queries.transpose(1, 2)
    cos, sin = (each[:, None, -last:].to(queries.dtype) for each in position_embeddings)
    return rotated(queries, cos, sin)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys rotated by their positions, all of the shape [..., head_dim]."""
    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-right, left), dim=-1) * sin


def weights(queries: Tensor, keys: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Return the sum of attention weights that every key gets from the last queries, shape [batch, key heads, keys].

    The sum is over queries; query heads that share a key head are averaged. A query sees its own key and those before.

    Args:
        queries: Queries of the last n tokens, shape [batch, query heads, n, head_dim].
        keys: All keys, the last n of which belong to the queries, shape [batch, key heads, keys, head_dim].
        scaling: Factor of the products.
        bias: Added to the logits of each key, shape [batch, key heads, keys].
    """
    total = torch.zeros(keys.shape[:-1], device=keys.device)
    for part, at in chunks(queries):
        total += probabilities(part, keys, scaling, bias, queries.shape[-2] - at).mean(2).sum(2)
    return total


def outputs(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Return the output of each query head before the projection, averaged over queries: [batch, query heads, head_dim].

    Args:
        queries: Queries of the last n tokens, shape [batch, query heads, n, head_dim].
        keys: All keys, shape [batch, key heads, keys, head_dim].
        values: All values, of the same shape.
        scaling: Factor of the products.
    """
    total = torch.zeros(*queries.shape[:2], values.shape[-1], device=keys.device)
    for part, at in chunks(queries):
        weight = probabilities(part, keys, scaling, None, queries.shape[-2] - at).sum(3)
        total += (weight @ values.float()).flatten(1, 2)
    return total / queries.shape[-2]


def chunks(queries: Tensor) -> list[tuple[Tensor, int]]:
    """Return queries in parts whose weights fit into memory, and the place of each part's first query."""
    starts = range(0, queries.shape[-2], _AT_ONCE)
    return [(queries[:, :, at : at + _AT_ONCE], at) for at in starts]


def probabilities(queries: Tensor, keys: Tensor, scaling: float, bias: Tensor | None, left: int) -> Tensor:
    """Return attention weights, shape [batch, key heads, group, queries, keys]; the first query is `left` from the end."""
    grouped = queries.float().reshape(keys.shape[0], keys.shape[1], -1, *queries.shape[-2:])
    logits = grouped @ keys.float().mT.unsqueeze(2) * scaling
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    count, length = logits.shape[-2:]
    positions = torch.arange(length, device=keys.device)
    own = torch.arange(length - left, length - left + count, device=keys.device)
    seen: Tensor = logits.masked_fill(positions > own[:, None], float("-inf"))
    return seen.softmax(-1)


def causal_mask(new: int, bias: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to logits: `bias` for what is cached, and for `new` tokens those before them.

    Args:
        new: Number of new tokens.
        bias: Added to the logits of cached keys, shape [batch, key heads, keys].
        groups: Query heads per key head.
        dtype: That of the queries.

    Returns:
        Shape [batch, query heads, new, keys + new].
    """
    lowest = torch.finfo(dtype).min
    past = bias.clamp(min=lowest).to(dtype).repeat_interleave(groups, dim=1)[:, :, None].expand(-1, -1, new, -1)
    square = torch.full((new, new), lowest, dtype=dtype, device=bias.device).triu(1)
    return torch.cat((past, square.expand(*past.shape[:2], -1, -1)), dim=-1)
