"""Samplers that are not Optuna's: one file for each, and what they share in `own`."""

from .greedy import propose_greedy
from .m2n2 import propose_m2n2
from .own import Past, Propose, wrap
from .particles import propose_particle
from .quadratic import propose_quadratic

OWN: dict[str, Propose] = {
    "greedy": propose_greedy,
    "particles": propose_particle,
    "quadratic": propose_quadratic,
    "m2n2": propose_m2n2,
}
"""The samplers by name."""

__all__ = ["OWN", "Past", "Propose", "wrap"]
