"""Weights of the sources for a sequence, by how well each of them predicts it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CHOICES", "average", "avg_ce", "min_ce", "rewards"]


def rewards(cross_entropy: Tensor) -> Tensor:
    """Return the reward of each source, exp(-CE): the geometric mean of the probabilities of the text's tokens.

    Args:
        cross_entropy: Nats per token, shape [..., sources]; infinity for a source that does not teach.
    """
    return torch.exp(-cross_entropy)


def min_ce(cross_entropy: Tensor) -> Tensor:
    """Return the weights of MinCE: the source with the lowest cross-entropy teaches, of several the first.

    Args:
        cross_entropy: Nats per token, shape [..., sources]; infinity for a source that does not teach.

    Returns:
        Same shape; each row adds up to 1, or is 0 if no source teaches.

    Source:
        Wan et al., Knowledge Fusion of Large Language Models (FuseLLM), ICLR 2024, section 3.3.
    """
    first = torch.nn.functional.one_hot(cross_entropy.argmin(-1), cross_entropy.shape[-1])
    return first.to(cross_entropy) * cross_entropy.isfinite()


def avg_ce(cross_entropy: Tensor) -> Tensor:
    """Return the weights of AvgCE: the softmax of the rewards exp(-CE), as the authors' code has it.

    Arguments, result and source as for `min_ce`.
    """
    taught = cross_entropy.isfinite()
    weights = torch.where(taught, rewards(cross_entropy).exp(), 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def average(cross_entropy: Tensor) -> Tensor:
    """Return equal weights of the sources that teach; arguments and result as for `min_ce`."""
    taught = cross_entropy.isfinite().to(cross_entropy)
    return taught / taught.sum(-1, keepdim=True).clamp(min=1.0)


CHOICES = {"min_ce": min_ce, "avg_ce": avg_ce, "average": average}
"""The fixed choices, by name."""
