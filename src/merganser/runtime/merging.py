"""Merging entries or tokens that go into those that stay."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["absorb", "added", "fold", "highest", "nearest", "shares"]


def highest(scores: Tensor, count: int) -> Tensor:
    """Return the places of the highest scores, the highest first, shape [..., count]; of equal ones the first.

    `torch.topk` takes any of those that are equal to the smallest one that it returns, so that the choice may depend on the
    machine and on the batch.
    """
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]


def nearest(keys: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each key the highest cosine to a kept one, and which it is: float32 and int64, [batch, heads, keys]."""
    cosines = normalize(keys.float(), dim=-1) @ normalize(kept.float(), dim=-1).mT
    best = cosines.max(dim=-1)
    return best.values, best.indices


def shares(own: Tensor, other: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights that add up to 1 for every entry that stays.

    Args:
        own: Weights of the entries that stay, at least 0, shape [..., kept].
        other: Weights of the entries that go, at least 0, shape [..., gone].
        target: The entry that each goes into, shape [..., gone].

    Returns:
        The shares of both. An entry whose weights are all 0 stays as it is.
    """
    total = own.scatter_add(-1, target, other)
    nothing = total <= 0
    total = total.masked_fill(nothing, 1.0)
    return (own / total).masked_fill(nothing, 1.0), other / total.gather(-1, target)


def fold(stay: Tensor, go: Tensor, own: Tensor, other: Tensor, target: Tensor) -> Tensor:
    """Return the entries that stay, with those that go merged into them, in float32 and rounded once.

    Args:
        stay: Shape [..., kept, d].
        go: Shape [..., gone, d].
        own: Shares of the entries that stay.
        other: Shares of the entries that go.
        target: The entry that each goes into.
    """
    sums = stay.float() * own[..., None]
    index = target[..., None].expand_as(go)
    return sums.scatter_add(-2, index, go.float() * other[..., None]).to(stay.dtype)


def absorb(tokens: Tensor, weights: Tensor, gone: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge tokens into others: each that stays becomes the weighted mean of itself and of those that go into it.

    Args:
        tokens: Shape [batch, tokens, d].
        weights: Above 0, shape [batch, tokens].
        gone: The tokens that go, shape [batch, r].
        into: The token that each goes into, which stays, shape [batch, r].

    Returns:
        What stays, in order, [batch, tokens - r, d]; which tokens those are, [batch, tokens - r]; and for each token that
        goes, the place among them that it went into, [batch, r].
    """
    stays = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, gone, False)
    every = torch.arange(tokens.shape[1], device=tokens.device).expand_as(stays)
    kept = every[stays].reshape(len(tokens), -1)
    target = (stays.cumsum(1) - 1).gather(1, into)
    own, other = shares(weights.gather(1, kept), weights.gather(1, gone), target)
    left, lost = (tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1])) for index in (kept, gone))
    return fold(left, lost, own, other, target), kept, target


def added(sizes: Tensor, gone: Tensor, kept: Tensor, target: Tensor) -> Tensor:
    """Return the sizes of what stays, with those of what went into it: `absorb` says what did."""
    return sizes.gather(1, kept).scatter_add(1, target, sizes.gather(1, gone))
