"""MergeMoE: down projections are fitted to what the experts of a group computed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..experts import Experts, Observed
from ..grouping import by_centres, highest
from ..method import Reduced, ShrinkingMethod, router_means, shares

__all__ = ["METHOD"]

_CHUNK = 1024
_RIDGE = 1e-3


def _reduce(experts: Experts, seen: Observed, count: int) -> Reduced:
    usage = seen.usage()
    read = torch.cat([experts.units["gate"], experts.units["up"]], 1).flatten(1)
    groups = by_centres(-torch.cdist(read, read).double(), highest(usage, count))
    found = [_merge(experts.chosen(members), shares(usage, members), seen.inputs) for members in groups]
    return Reduced(groups, Experts.joined(found), router_means(groups, usage))


def _merge(members: Experts, weights: Tensor, inputs: Tensor) -> Experts:
    """Average a group; its down projection is moved by ridge regression to what the members compute on average.

        down = mean + (P^T P + ridge)^-1 P^T (sum_i w_i H_i down_i - P mean)

    P are the hidden units of the average, H_i those of a member. Where the text is too short to determine the
    solution, the average remains.
    """
    merged = members.averaged(weights)
    if members.count == 1:
        return merged
    mean = merged.units["down"][0]
    gram = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    cross = torch.zeros(mean.shape, dtype=torch.float64)
    for start in range(0, len(inputs), _CHUNK):
        rows = inputs[start : start + _CHUNK]
        hidden = merged.hidden(0, rows)
        wanted = -hidden @ mean
        for expert, weight in enumerate(weights.tolist()):
            wanted += weight * (members.hidden(expert, rows) @ members.units["down"][expert])
        gram += (hidden.T @ hidden).double()
        cross += (hidden.T @ wanted).double()
    ridge = _RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    moved = (mean.double() + torch.cholesky_solve(cross, factor)).float()
    return replace(merged, units={**merged.units, "down": moved[None]})


METHOD = ShrinkingMethod(
    "merge_moe",
    "miao2025mergemoe",
    "Merge each expert into the nearest of the most used; the down projection is fitted to the outputs by least squares.",
    _reduce,
)
