"""Model breadcrumbs: remove both the outliers and the noise of the task vectors."""

from typing import Literal

from torch import Tensor

from ..method import Fraction, PerModel, Scale, Weight, default, merge_method, statistic
from ..ops import check_total, collides, keep_middle, l1_gain, middle_cut, middle_norms, scaled, weighted_sum


@merge_method(
    family="task vectors",
    cite="davari2024breadcrumbs",
    scope="row",
    statistics={"cut": middle_cut(), "gain": statistic(middle_norms, l1_gain, when="rescale")},
    mergekit={"precedence": "density"},
    when={"precedence": collides},
    breaks={"identical": "the largest entries of the task vector are removed"},
    validate=check_total,
)
def breadcrumbs(
    base: Tensor,
    models: list[Tensor],
    cut: Tensor | None,
    gain: Tensor | None,
    *,
    weight: PerModel[Weight],
    density: PerModel[Fraction] = default(1.0),
    gamma: PerModel[Fraction] = default(0.01),
    lambda_: Scale = default(1.0),
    normalize: bool = False,
    rescale: bool = False,
    precedence: Literal["gamma", "density"] = "gamma",
    by: Literal["tensor", "row"] = "tensor",
) -> Tensor:
    """Remove the largest entries of the task vectors, keep the next largest, add the weighted rest to the base.

        r_i    = floor(gamma_i * size), k_i = floor(density_i * size)
        kept_i = delta_i where |delta_i| has a rank from r_i + 1 to r_i + k_i (1 for the largest), else 0
        merged = base + lambda * sum_i weight_i * kept_i

    Use when:
        Many fine-tunes are merged and settings should not be tuned again for each; a density of 0.05 to 0.2 is usual.

    Args:
        weight: Factor of each task vector.
        density: Share of the entries that is kept, once the largest are gone; mergekit's name for the paper's 1 - beta.
        gamma: Share of the entries that is removed as outliers, the largest.
        lambda_: Factor of the sum, alpha in the paper.
        normalize: Divide the sum by the sum of the weights.
        rescale: Scale what is kept of each task vector back to the L1 norm that the vector had.
        precedence: Which share holds if density + gamma is above 1. With gamma, all outliers are removed and fewer
            entries are kept; with density, fewer outliers are removed, and none at density 1.
        by: Rank the entries inside each tensor, or inside each row (all weights of one output unit).

    Differs from the paper:
        Nothing with `by: tensor`, which is what the paper says; the authors' code ranks within rows, as `by: row` does.
        Entries whose magnitude equals that of the first or the last kept entry are kept, too.
    """
    kept = scaled(keep_middle(base, models, cut, density, gamma, precedence, by), gain)
    total = weighted_sum(kept, weight)
    if normalize:
        total = total / weight.sum()
    return base + lambda_ * total
