"""Model breadcrumbs before TIES: remove outliers and noise, elect signs, add the entries that agree."""

from typing import Literal

from torch import Tensor

from ..method import Fraction, PerModel, Scale, Weight, default, merge_method, statistic
from ..ops import collides, disjoint_mean, keep_middle, l1_gain, middle_cut, middle_norms, scaled


@merge_method(
    family="task vectors",
    cite="davari2024breadcrumbs",
    scope="row",
    statistics={"cut": middle_cut(), "gain": statistic(middle_norms, l1_gain, when="rescale")},
    mergekit={"precedence": "density"},
    when={"precedence": collides},
    breaks={"identical": "the largest entries of the task vector are removed"},
)
def breadcrumbs_ties(
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
    """Remove the largest entries of the task vectors, keep the next largest, elect a sign, add those that agree.

        r_i    = floor(gamma_i * size), k_i = floor(density_i * size)
        kept_i = delta_i where |delta_i| has a rank from r_i + 1 to r_i + k_i (1 for the largest), else 0
        sign   = + where sum_i weight_i * kept_i >= 0, else -
        merged = base + lambda * (sum of weight_i * kept_i with that sign)

    Use when:
        Breadcrumbs would be used, but the task vectors disagree in sign.

    Args:
        weight: Factor of each task vector, in the vote and in the sum.
        density: Share of the entries that is kept, once the largest are gone; mergekit's name for the paper's 1 - beta.
        gamma: Share of the entries that is removed as outliers, the largest.
        lambda_: Factor of the merged task vector.
        normalize: Divide by the sum of the weights that agree, as TIES does.
        rescale: Scale what is kept of each task vector back to the L1 norm that the vector had.
        precedence: Which share holds if density + gamma is above 1. With gamma, all outliers are removed and fewer
            entries are kept; with density, fewer outliers are removed, and none at density 1.
        by: Rank the entries inside each tensor, or inside each row (all weights of one output unit).

    Differs from the paper:
        The paper adds without a vote; the combination is mergekit's.
        Entries whose magnitude equals that of the first or the last kept entry are kept, too.
        An exact tie of the vote elects plus.
    """
    kept = scaled(keep_middle(base, models, cut, density, gamma, precedence, by), gain)
    return base + lambda_ * disjoint_mean(kept, weight, base.dtype, normalize=normalize)
