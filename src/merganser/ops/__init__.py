"""Maths that two or more merge methods share.

Everything here is plain torch on float32 (or float64) blocks, written so that it gives the same bits eagerly and
fused: no `add(alpha=...)`, no `lerp`, whose vector and scalar forms round differently.
"""

from .gram import gram, unit_gram
from .order import magnitude_cut, order_statistic
from .random import Random
from .sum import deltas, normalizer, weighted_sum
from .votes import disjoint_mean, elect_sign

__all__ = [
    "Random",
    "deltas",
    "disjoint_mean",
    "elect_sign",
    "gram",
    "magnitude_cut",
    "normalizer",
    "order_statistic",
    "unit_gram",
    "weighted_sum",
]
