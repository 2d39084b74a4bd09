"""REAP: experts that contribute little are dropped."""

from __future__ import annotations

import torch

from ..experts import Experts, Observed
from ..grouping import highest
from ..measures import saliency
from ..method import Reduced, ShrinkingMethod

__all__ = ["METHOD"]


def _reduce(experts: Experts, seen: Observed, count: int) -> Reduced:
    kept = highest(saliency(experts, seen), count)
    rows = torch.eye(experts.count, dtype=torch.float64)[kept]
    return Reduced([[expert] for expert in kept], experts.chosen(kept), rows)


METHOD = ShrinkingMethod(
    "reap",
    "lasby2025reap",
    "Keep the experts with the largest weight times length of output, on average over their tokens; drop the others.",
    _reduce,
)
