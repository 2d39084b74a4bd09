"""HC-SMoE: experts are clustered by their mean outputs; the router is not used."""

from __future__ import annotations

from ..experts import Experts, Observed
from ..grouping import by_linkage
from ..measures import mean_outputs
from ..method import Reduced, ShrinkingMethod, merge_groups, router_means

__all__ = ["METHOD"]


def _reduce(experts: Experts, seen: Observed, count: int) -> Reduced:
    usage = seen.usage()
    groups = by_linkage(mean_outputs(experts, seen), count)
    return Reduced(groups, merge_groups(experts, groups, usage, align=False), router_means(groups, usage))


METHOD = ShrinkingMethod(
    "hc_smoe",
    "chen2025hcsmoe",
    "Cluster experts hierarchically by their mean outputs over all tokens, and average each cluster by usage.",
    _reduce,
)
