"""mp-IRT: as p-IRT, with an ability between those of the models that were merged.

Source: Mencattini et al., MERGE3, ICML 2025, arXiv 2502.10436.
"""

from __future__ import annotations

from .irt import Seen, fit_mixture


def estimate_mp_irt(seen: Seen) -> float:
    """Return the accuracy on all items: as `Estimator`."""
    return seen.fill(fit_mixture(seen.items.at(seen.where), seen.answers, seen.parents))
