"""Samplers that are not Optuna's: one file for each, and what they share in `own`."""

from .bayesian import propose_bayesian
from .genome import propose_genome
from .greedy import propose_greedy
from .m2n2 import propose_m2n2
from .nested import is_nestable, propose_nested
from .own import Past, Propose, wrap
from .particles import propose_particle
from .quadratic import propose_quadratic

OWN: dict[str, Propose] = {
    "greedy": propose_greedy,
    "particles": propose_particle,
    "quadratic": propose_quadratic,
    "m2n2": propose_m2n2,
    "genome": propose_genome,
    "nested": propose_nested,
    "bayesian": propose_bayesian,
}
"""The samplers by name."""

__all__ = ["OWN", "Past", "Propose", "is_nestable", "wrap"]
