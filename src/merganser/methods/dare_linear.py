"""DARE: drop entries of the task vectors at random, rescale the rest, add them to the base."""

from typing import Literal

from torch import Tensor

from ..method import Fraction, PerModel, Scale, Weight, default, merge_method, statistic
from ..ops import Random, check_total, drop, drop_norms, l1_gain, rescales, restores_l1, scaled, weighted_sum


@merge_method(
    family="task vectors",
    cite="yu2024dare",
    statistics={"gain": statistic(drop_norms, l1_gain, when=restores_l1)},
    mergekit={"rescale_to": "l1"},
    when={"rescale_to": rescales},
    validate=check_total,
)
def dare_linear(
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
    """Drop entries of the task vectors at random, rescale the others, add the weighted task vectors to the base.

        kept_i = delta_i / density_i with probability density_i, else 0     (independently for every element)
        merged = base + lambda * sum_i weight_i * kept_i

    Use when:
        The task vectors are small and redundant, as after supervised fine-tuning, and should interfere less. DARE fails
        on large task vectors, such as those of continued pre-training.

    Args:
        weight: Factor of each task vector.
        density: Probability of an entry to be kept; the paper's drop rate is 1 - density.
        lambda_: Factor of the sum.
        normalize: Divide the sum by the sum of the weights.
        rescale: Rescale the entries that are kept, to make up for those that are dropped.
        rescale_to: Divide the kept entries by the density, which preserves the expectation of every entry, or scale
            them to the L1 norm of the whole task vector, which preserves it only on average over a tensor.

    Differs from the paper:
        Nothing. Draws depend only on the seed, the tensor's name, the model's position and the element.
    """
    kept = drop(base, models, rng, density, rescale=rescale and gain is None)
    total = weighted_sum(scaled(kept, gain), weight)
    if normalize:
        total = total / weight.sum()
    return base + lambda_ * total
