"""ToMe: the most similar pairs across two halves (Bolya et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["tome"]


def tome(metric: Tensor, r: int, first: int, depth: float) -> tuple[Tensor, Tensor]:
    """Choose `r` tokens that go, and the token that each goes into.

    Tokens at even places look for the most similar token at an odd place; the `r` most similar pairs are merged.

    Args:
        metric: Keys, averaged over heads, shape [batch, tokens, head_dim].
        r: Number of tokens that go, at most half of those that may.
        first: 1 if the first token is a class token, which is never merged; else 0.
        depth: Not used.

    Returns:
        Indices of the tokens that go and of those that they go into, both of the shape [batch, r].
    """
    metric = normalize(metric.float(), dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].mT
    scores[:, :first] = float("-inf")
    best = scores.max(dim=-1)
    chosen = best.values.argsort(dim=-1, descending=True)[:, :r]
    return 2 * chosen, 2 * torch.gather(best.indices, 1, chosen) + 1
