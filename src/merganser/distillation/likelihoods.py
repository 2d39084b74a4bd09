"""The likeliest next tokens of a position, and the probability of all others together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Likelihoods", "likelihoods"]

# rows that are converted to float64 at once
_ROWS = 64


@dataclass(frozen=True)
class Likelihoods:
    """What a model predicts at some positions. All logarithms are natural.

    Args:
        ids: The k likeliest tokens, the likeliest first, int32, shape [positions, k].
        log_probabilities: Theirs, over the whole vocabulary, float32, shape [positions, k].
        rest: Logarithm of the probability of all other tokens together, float32, shape [positions]; minus infinity if
            there are none.
        log_sum_exp: Logarithm of the sum of the exponentials of all logits, float32, shape [positions]; with it, the
            logits are `log_probabilities + log_sum_exp`.
        words: Logarithm of the probability that one of some given tokens follows, float32, shape [positions].
    """

    ids: Tensor
    log_probabilities: Tensor
    rest: Tensor
    log_sum_exp: Tensor
    words: Tensor


def likelihoods(logits: Tensor, k: int, tokens: Tensor, words: Tensor | None = None) -> tuple[Likelihoods, Tensor]:
    """Return the k likeliest tokens of each position, and the log-probability of one given token of each.

    Sums are computed in float64. Of equal logits the lower token comes first, so that the result does not depend on the
    machine.

    Args:
        logits: Floating, shape [positions, vocabulary].
        k: From 1 to the size of the vocabulary.
        tokens: One token of each position, int64, shape [positions].
        words: The tokens whose probability together is returned, bool, shape [vocabulary]; None for all.

    Returns:
        The likeliest tokens, and the log-probabilities of `tokens`, float32, shape [positions].
    """
    parts = [
        _some(rows.double(), k, own, words)
        for rows, own in zip(torch.split(logits, _ROWS), torch.split(tokens, _ROWS), strict=True)
    ]
    ids, *others = (torch.cat(each) for each in zip(*parts, strict=True))
    top, rest, total, begins, given = (own.float() for own in others)
    return Likelihoods(ids.int(), top, rest, total, begins), given


def _some(logits: Tensor, k: int, tokens: Tensor, words: Tensor | None) -> tuple[Tensor, ...]:
    total = logits.logsumexp(-1)
    ids = _likeliest(logits, k)
    top = logits.gather(1, ids) - total[:, None]
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(-1) - total
    given = logits.gather(1, tokens[:, None])[:, 0] - total
    begins = torch.zeros_like(total) if words is None else logits[:, words].logsumexp(-1) - total
    return ids, top, rest, total, begins, given


def _likeliest(logits: Tensor, k: int) -> Tensor:
    """Return the k largest of each row, largest first; of equal ones the first."""
    least = logits.topk(k).values[:, -1:]
    above, equal = logits > least, logits == least
    # torch.topk chooses any of the values that are equal to the smallest one it returns
    wanted = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= wanted))
    ids = chosen.nonzero()[:, 1].view(-1, k)
    order = logits.gather(1, ids).argsort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order)
