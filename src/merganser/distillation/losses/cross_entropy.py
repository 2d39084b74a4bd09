"""Cross-entropy with a distribution of which the likeliest tokens are known, and the probability of all others together."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["taught_cross_entropy"]


def taught_cross_entropy(logits: Tensor, ids: Tensor, log_probabilities: Tensor, rest: Tensor) -> Tensor:
    """Return the cross-entropy between a source's distribution and the student's, in nats.

        loss = - sum_i p_i log q_i - p_rest log (1 - sum_i q_i)          over the tokens i that are known

    The gradient is zero where q has the probabilities that are known, however many these are. FuseLLM has no rest, and
    divides the k probabilities by their sum; pass minus infinity as `rest` for that.

    Args:
        logits: Shape [positions, vocabulary]; the loss is computed in float32, or float64 if they are.
        ids: Tokens, integers, shape [positions, k], each once, at least one per row; -1 where a row has fewer.
        log_probabilities: Theirs, shape [positions, k], minus infinity where a row has fewer.
        rest: Logarithm of the probability of all other tokens, shape [positions]; minus infinity for none.

    Returns:
        Shape [positions].

    Source:
        Wan et al., Knowledge Fusion of Large Language Models (FuseLLM), ICLR 2024, equation 4; the rest is ours.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = logits.logsumexp(-1)
    # where a row has fewer tokens, one of them stands again, with probability 0
    ids = torch.where(ids < 0, ids.amax(-1, keepdim=True), ids).long()
    known = logits.gather(1, ids) - total[:, None]
    loss = -(log_probabilities.to(logits.dtype).exp() * known).sum(-1)
    some = rest > -torch.inf
    if bool(some.any()):
        others = logits[some].scatter(1, ids[some], -torch.inf).logsumexp(-1) - total[some]
        loss = loss.index_add(0, some.nonzero()[:, 0], -rest[some].to(logits.dtype).exp() * others)
    return loss
