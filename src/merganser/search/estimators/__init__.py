"""Estimators of a model's accuracy on all items from the items that it saw: one file for each, and what they share in `irt`."""

from .fit import fit_items
from .gmp_irt import estimate_gmp_irt
from .gp_irt import estimate_gp_irt
from .irt import Estimator, Items, Seen, fit_ability
from .mp_irt import estimate_mp_irt
from .p_irt import estimate_p_irt
from .parameters import read_parameters

ESTIMATORS: dict[str, Estimator] = {
    "p_irt": estimate_p_irt,
    "gp_irt": estimate_gp_irt,
    "mp_irt": estimate_mp_irt,
    "gmp_irt": estimate_gmp_irt,
}
"""The estimators by item response theory, by name; `control_variate` is for figures of any kind."""

__all__ = ["ESTIMATORS", "Estimator", "Items", "Seen", "fit_ability", "fit_items", "read_parameters"]
