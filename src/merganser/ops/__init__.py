"""Maths that two or more merge methods share.

Everything here is plain torch on float32 (or float64) blocks, written so that single and fused operations give the same
bits: no `add(alpha=...)` and no `lerp`, whose vectorised and scalar versions round differently.
"""

from .bits import pack_codes, pack_flags, packed_size, unpack_codes, unpack_flags
from .drop import check_spread, drop, drop_norms, magprune, magprune_norms, rescales, restores_l1
from .linalg.factors import factor, leading, rank_of
from .linalg.gram import gram, inverse_norms, unit_gram
from .linalg.least_squares import fit_outputs, shrunk, solve_right
from .masks import elect_largest, tall_mask
from .middle import collides, keep_middle, middle_cut, middle_norms
from .order import at_least, magnitude_cut, order_statistic
from .overlap import average_changes, changed
from .random import Random
from .rows import by_rank, rank_keys, sort_rows
from .shares import best, shares
from .sphere import along, arc, check_directions
from .sum import check_total, deltas, l1_gain, l1_norms, not_negative, round_down, scaled, squared_norms, weighted_sum
from .trim import delta_magnitudes, trim
from .votes import agreeing_largest, agreeing_sum, disjoint_mean, elect_sign, vote

__all__ = [
    "Random",
    "agreeing_largest",
    "agreeing_sum",
    "along",
    "arc",
    "at_least",
    "average_changes",
    "best",
    "by_rank",
    "changed",
    "check_directions",
    "check_spread",
    "check_total",
    "collides",
    "delta_magnitudes",
    "deltas",
    "disjoint_mean",
    "drop",
    "drop_norms",
    "elect_largest",
    "elect_sign",
    "factor",
    "fit_outputs",
    "gram",
    "inverse_norms",
    "keep_middle",
    "l1_gain",
    "l1_norms",
    "leading",
    "magnitude_cut",
    "magprune",
    "magprune_norms",
    "middle_cut",
    "middle_norms",
    "not_negative",
    "order_statistic",
    "pack_codes",
    "pack_flags",
    "packed_size",
    "rank_keys",
    "rank_of",
    "rescales",
    "restores_l1",
    "round_down",
    "scaled",
    "shares",
    "shrunk",
    "solve_right",
    "sort_rows",
    "squared_norms",
    "tall_mask",
    "trim",
    "unit_gram",
    "unpack_codes",
    "unpack_flags",
    "vote",
    "weighted_sum",
]
