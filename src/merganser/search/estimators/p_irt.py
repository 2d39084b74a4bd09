"""p-IRT: the known answers, and what the model's own ability makes probable for the other items.

Source: Polo et al., tinyBenchmarks, ICML 2024, arXiv 2402.14992.
"""

from __future__ import annotations

from .irt import Seen, fit_ability


def estimate_p_irt(seen: Seen) -> float:
    """Return the accuracy on all items: as `Estimator`."""
    return seen.fill(fit_ability(seen.items.at(seen.where), seen.answers))
