"""gp-IRT: half p-IRT, half the plain mean, which does not depend on the item model.

Source: Polo et al., tinyBenchmarks, ICML 2024, arXiv 2402.14992; half of each as in MERGE3, where tinyBenchmarks chooses the share
for each benchmark.
"""

from __future__ import annotations

from .irt import Seen
from .p_irt import estimate_p_irt


def estimate_gp_irt(seen: Seen) -> float:
    """Return the accuracy on all items: as `Estimator`."""
    return 0.5 * seen.mean + 0.5 * estimate_p_irt(seen)
