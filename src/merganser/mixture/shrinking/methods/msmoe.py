"""M-SMoE: each expert joins the frequently used one with the most similar router logits."""

from __future__ import annotations

from ..experts import Experts, Observed
from ..grouping import by_centres, highest
from ..measures import cosines
from ..method import Reduced, ShrinkingMethod, merge_groups, router_means

__all__ = ["METHOD"]


def _reduce(experts: Experts, seen: Observed, count: int) -> Reduced:
    usage = seen.usage()
    groups = by_centres(cosines(seen.logits), highest(usage, count))
    # the paper keeps all rows of the router and lets several name one expert, which no standard checkpoint can
    return Reduced(groups, merge_groups(experts, groups, usage, align=True), router_means(groups, usage))


METHOD = ShrinkingMethod(
    "msmoe",
    "li2024msmoe",
    "Merge each expert into one of the most used, the one whose router logits are most alike; aligned, weighted by usage.",
    _reduce,
)
