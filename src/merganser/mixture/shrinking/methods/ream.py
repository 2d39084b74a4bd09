"""REAM: experts join the most salient ones, with REAP's measure of saliency."""

from __future__ import annotations

import torch

from ..experts import Experts, Observed
from ..grouping import by_centres, highest
from ..measures import cosines, gated_cosines, saliency
from ..method import Reduced, ShrinkingMethod, merge_groups

__all__ = ["METHOD"]

_MOST = 16
"""Largest size of a group, unless so many experts must go that groups are larger."""


def _reduce(experts: Experts, seen: Observed, count: int) -> Reduced:
    scores = saliency(experts, seen)
    centres = highest(scores, count)
    alike = (cosines(seen.logits) + gated_cosines(experts, seen)) / 2
    groups = by_centres(alike, centres, max(_MOST, -(-experts.count // count)))
    rows = torch.eye(experts.count, dtype=torch.float64)[centres]
    return Reduced(groups, merge_groups(experts, groups, scores, align=True), rows)


METHOD = ShrinkingMethod(
    "ream",
    "ream2026",
    "Merge each expert into the most similar of the most salient, aligned and weighted by saliency; the router keeps these.",
    _reduce,
)
