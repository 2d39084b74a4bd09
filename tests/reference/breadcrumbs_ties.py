"""Davari and Belilovsky 2024, "Model Breadcrumbs", section 3.2, followed by the election of TIES-Merging."""

from tests.reference.breadcrumbs import crumbs
from tests.reference.ties import elect_and_merge


def breadcrumbs_ties(
    base,
    models,
    *,
    weight,
    density=None,
    gamma=None,
    normalize=False,
    rescale=False,
    precedence="gamma",
    by="tensor",
    **other,
):
    base = base.double()
    kept = crumbs(base, models, density, gamma, precedence, by, rescale)
    return base + other.get("lambda", 1.0) * elect_and_merge(kept, weight, normalize)
