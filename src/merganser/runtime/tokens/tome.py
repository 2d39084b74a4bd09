"""ToMe: the most similar pairs across two halves (Bolya et al. 2023)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["tome"]


def tome(metric: Tensor, r: int, first: int, depth: float) -> tuple[Tensor, Tensor]:
    """Choose `r` tokens that go, and the token that each goes into.

    Tokens at even places look for the most similar token at an odd place; the `r` most similar pairs are merged.

    Args:
        metric: Keys, averaged over heads, shape [batch, tokens, head_dim].
        r: Number of tokens that go, at most half of those that may.
        first: Number of class tokens, which come first and are never merged.
        depth: Not used.

    Returns:
        Indices of the tokens that go and of those that they go into, both of the shape [batch, r].
    """
    metric = normalize(metric[:, first:].float(), dim=-1)
    # places are even or odd among all tokens
    even, odd = first % 2, 1 - first % 2
    best = (metric[:, even::2] @ metric[:, odd::2].mT).max(dim=-1)
    chosen = best.values.argsort(dim=-1, descending=True, stable=True)[:, :r]
    return first + even + 2 * chosen, first + odd + 2 * best.indices.gather(1, chosen)
