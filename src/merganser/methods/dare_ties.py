"""DARE before TIES: drop entries at random, rescale the rest, elect signs, add those that agree."""

from typing import Literal

from torch import Tensor

from ..method import Fraction, PerModel, Scale, Weight, default, merge_method, statistic
from ..ops import Random, disjoint_mean, drop, drop_norms, l1_gain, rescales, restores_l1, scaled


@merge_method(
    family="task vectors",
    cite="yu2024dare",
    statistics={"gain": statistic(drop_norms, l1_gain, when=restores_l1)},
    mergekit={"rescale_to": "l1"},
    when={"rescale_to": rescales},
)
def dare_ties(
    base: Tensor,
    models: list[Tensor],
    rng: Random,
    gain: Tensor | None,
    *,
    weight: PerModel[Weight],
    density: PerModel[Fraction] = default(1.0),
    lambda_: Scale = default(1.0),
    normalize: bool = False,
    rescale: bool = True,
    rescale_to: Literal["expectation", "l1"] = "expectation",
) -> Tensor:
    """Drop entries of the task vectors at random, rescale the survivors, elect a sign per element, add those that agree.

        kept_i = delta_i / density_i with probability density_i, else 0     (independently for every element)
        sign   = + where sum_i weight_i * kept_i >= 0, else -
        merged = base + lambda * (sum of weight_i * kept_i with that sign)

    Use when:
        As DARE, and the task vectors disagree in sign.

    Args:
        weight: Factor of each task vector, in the vote and in the sum.
        density: Probability of an entry to be kept; the paper's drop rate is 1 - density.
        lambda_: Factor of the merged task vector.
        normalize: Divide by the sum of the weights that agree, as TIES does.
        rescale: Scale the kept entries up, to compensate for dropped ones.
        rescale_to: "expectation" divides the kept entries by the density, which preserves the expectation of every
            entry; "l1" restores the L1 norm of each task vector, which preserves it only in the mean over a tensor.

    Differs from the paper:
        There is no trim of TIES after DARE has dropped entries.
        The default adds; `normalize: true` is the disjoint mean of TIES.
        An exact tie of the vote elects plus.
    """
    kept = drop(base, models, rng, density, rescale=rescale and gain is None, exact=True)
    return base + lambda_ * disjoint_mean(scaled(kept, gain), weight, base.dtype, normalize=normalize)
