"""Yu et al. 2024, "Language Models are Super Mario", section 3.3: DARE as a plug-in of TIES-Merging, without its trim."""

from tests.reference.dare_linear import dare
from tests.reference.ties import elect_and_merge


def dare_ties(
    base,
    models,
    *,
    weight,
    density=None,
    normalize=False,
    rescale=True,
    rescale_to="expectation",
    seed=0,
    tensor="tensor",
    **other,
):
    base = base.double()
    kept = dare(base, models, density, rescale, rescale_to, seed, tensor)
    return base + other.get("lambda", 1.0) * elect_and_merge(kept, weight, normalize)
