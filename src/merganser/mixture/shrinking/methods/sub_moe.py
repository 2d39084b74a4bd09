"""Sub-MoE: experts are clustered by the directions of their outputs, and merged in the space that they share.

The paper decomposes the matrices of a cluster together, [W_1 ... W_n] = U S [V_1; ...; V_n]^T, averages the V_i by usage,
and multiplies again. As W_i = U S V_i^T exactly, the result is the average of the W_i by usage, which is computed here.
"""

from __future__ import annotations

from ..experts import Experts, Observed
from ..grouping import by_means
from ..measures import output_cosines
from ..method import Reduced, ShrinkingMethod, merge_groups, router_means

__all__ = ["METHOD"]


def _reduce(experts: Experts, seen: Observed, count: int) -> Reduced:
    usage = seen.usage()
    groups = by_means(output_cosines(experts, seen), count, int(usage.argmax()))
    return Reduced(groups, merge_groups(experts, groups, usage, align=False), router_means(groups, usage))


METHOD = ShrinkingMethod(
    "sub_moe",
    "li2025submoe",
    "Cluster experts by k-means on the directions of their outputs, and merge each cluster in its joint subspace.",
    _reduce,
)
