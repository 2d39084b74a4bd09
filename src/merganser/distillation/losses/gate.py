"""Fusion-X: a gate that is trained with the model chooses the sources of each sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .choice import rewards

__all__ = ["FEEDBACK", "FusionGate"]

FEEDBACK = 0.5
"""Factor of the feedback loss in the authors' code."""
_THRESHOLD = 0.15


class FusionGate(nn.Module):  # type: ignore[misc,unused-ignore]
    """Weights of sources from their rewards, by three layers with GELU between them.

    Sources whose share is 0.15 or less are left out, unless all are: then the first of the largest shares counts alone. The
    authors' code applies the gate to every entry of the distributions, though all entries of a sequence have one reward; here
    it is applied to the sequence.

    Args:
        sources: Number of sources.

    Source:
        Kong et al., Enabling Flexible Multi-LLM Integration for Scalable Knowledge Aggregation (Fusion-X), 2025.
    """

    def __init__(self, sources: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(sources, 2 * sources),
            nn.GELU(),
            nn.Linear(2 * sources, sources),
            nn.GELU(),
            nn.Linear(sources, sources),
        )

    def forward(self, cross_entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the sources, and the feedback loss.

        Args:
            cross_entropy: Nats per token, shape [sequences, sources]; infinity for a source that does not teach.

        Returns:
            Weights, same shape, each row with the sum 1, or 0 if no source teaches; and the squared coefficient of
            variation of the sources' sums of weights over the batch, a scalar.
        """
        taught = cross_entropy.isfinite()
        shares = self.layers(rewards(cross_entropy)).masked_fill(~taught, -torch.inf)
        # a row without any source would be NaN, and its gradient, too
        shares = torch.where(taught.any(-1, keepdim=True), shares, 0.0).softmax(-1) * taught
        kept = shares > _THRESHOLD
        largest = nn.functional.one_hot(shares.argmax(-1), shares.shape[-1]).bool()
        kept = torch.where(kept.any(-1, keepdim=True), kept, largest & taught)
        weights = shares * kept
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-8)
        return weights, _feedback(weights.sum(0))


def _feedback(importance: Tensor) -> Tensor:
    """Return the squared coefficient of variation; 0 for a single source."""
    if len(importance) == 1:
        return importance.sum() * 0
    return importance.var() / (importance.mean().square() + 1e-10)
