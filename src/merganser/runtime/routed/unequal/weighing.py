"""Weights of experts from scores of a text, after every token of it: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_perplexities", "means_so_far", "top_softmax"]


def top_softmax(scores: Tensor, top: int | None) -> Tensor:
    """Return `softmax(top-K(scores))`: the softmax over the largest scores, and 0 for the others.

    Args:
        scores: Shape [..., experts].
        top: How many are left; of equal ones the first. None for all.

    Returns:
        In the same shape; the last axis adds up to 1.
    """
    if top is None or top >= scores.shape[-1]:
        return scores.softmax(-1)
    # topk promises nothing about equal scores
    kept = scores.argsort(dim=-1, descending=True, stable=True)[..., :top]
    left = torch.full_like(scores, float("-inf")).scatter(-1, kept, scores.gather(-1, kept))
    return left.softmax(-1)


def means_so_far(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens up to each, without padding.

    Args:
        values: Shape [rows, length, width].
        mask: 1 for tokens and 0 for padding, shape [rows, length].

    Returns:
        float32, shape [rows, length, width]; 0 in front of the first token.
    """
    counted = mask.to(torch.float32)[..., None]
    return (values.float() * counted).cumsum(1) / counted.cumsum(1).clamp_min(1)


def inverse_perplexities(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return `1 / PPL` of the tokens up to each: `exp` of the mean log-likelihood of those that have one before them.

    Args:
        logits: Shape [rows, length, vocabulary].
        ids: Tokens, shape [rows, length].
        mask: 1 for tokens and 0 for padding, in the same shape.

    Returns:
        float32, shape [rows, length]; 1 where no token has one before it.
    """
    counted = (mask[:, 1:] * mask[:, :-1]).to(torch.float32)
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none")
    # logits of padding may be anything, also NaN
    total = torch.where(counted > 0, nats, 0.0).cumsum(1) / counted.cumsum(1).clamp_min(1)
    return torch.nn.functional.pad(total, (1, 0)).neg().exp()
