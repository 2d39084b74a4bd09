"""Deep et al. 2024, "DELLA-Merging", section 3: drop (MagPrune), elect, fuse."""

from tests.reference.della_linear import magprune
from tests.reference.ties import elect_and_merge


def della(
    base,
    models,
    *,
    weight,
    density=None,
    epsilon=None,
    normalize=True,
    rescale=True,
    rescale_to="expectation",
    seed=0,
    tensor="tensor",
    **other,
):
    base = base.double()
    kept = magprune(base, models, density, epsilon, rescale, rescale_to, seed, tensor)
    return base + other.get("lambda", 1.0) * elect_and_merge(kept, weight, normalize)
