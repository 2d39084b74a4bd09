"""gmp-IRT: half mp-IRT, half the plain mean, which does not depend on the item model.

Source: Mencattini et al., MERGE3, ICML 2025, arXiv 2502.10436.
"""

from __future__ import annotations

from .irt import Seen
from .mp_irt import estimate_mp_irt


def estimate_gmp_irt(seen: Seen) -> float:
    """Return the accuracy on all items: as `Estimator`."""
    return 0.5 * seen.mean + 0.5 * estimate_mp_irt(seen)
