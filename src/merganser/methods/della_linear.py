"""DELLA without sign election: drop small entries more often, rescale the rest, add the task vectors to the base."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from torch import Tensor

from ..method import Fraction, Number, PerModel, Scale, Weight, default, merge_method, statistic
from ..ops import (
    Random,
    check_spread,
    check_total,
    l1_gain,
    magprune,
    magprune_norms,
    rescales,
    restores_l1,
    scaled,
    weighted_sum,
)


def check(parameters: Mapping[str, Any]) -> str | None:
    """Return what is wrong if a probability is out of range, or if weights that are normalised add up to 0."""
    return check_spread(parameters) or check_total(parameters)


@merge_method(
    family="task vectors",
    cite="deep2024della",
    scope="row",
    statistics={"gain": statistic(magprune_norms, l1_gain, when=restores_l1)},
    mergekit={"rescale_to": "l1"},
    when={"rescale_to": rescales},
    validate=check,
)
def della_linear(
    base: Tensor,
    models: list[Tensor],
    rng: Random,
    gain: Tensor | None,
    *,
    weight: PerModel[Weight],
    density: PerModel[Fraction] = default(1.0),
    epsilon: PerModel[Annotated[Tensor, Number(0.0, search=(0.0, 0.2))]] = default(0.15),
    lambda_: Scale = default(1.0),
    normalize: bool = False,
    rescale: bool = True,
    rescale_to: Literal["expectation", "l1"] = "expectation",
) -> Tensor:
    """Drop entries of the task vectors at random, small ones more often, rescale the survivors, add them to the base.

        p_ij   = density_i - epsilon_i + 2 epsilon_i (rank_ij - 1) / (n - 1)
        kept_i = delta_ij / p_ij with probability p_ij, else 0
        merged = base + lambda * sum_i weight_i * kept_i

    rank_ij is the rank of |delta_ij| among the n entries of its row, 1 for the smallest.

    Use when:
        DARE would be suitable, but large changes matter more than small ones; `della` also elects signs.

    Args:
        weight: Factor of each task vector.
        density: Mean probability of an entry to be kept; 1 keeps all entries, 0 none.
        epsilon: Half the difference between the keep probabilities of the largest and the smallest entry of a row.
        lambda_: Factor of the sum.
        normalize: Divide the sum by the sum of the weights.
        rescale: Rescale the entries that are kept, to make up for those that are dropped.
        rescale_to: Divide each kept entry by its own probability, which preserves the expectation of every entry, or
            scale them to the L1 norm of the whole task vector, which favours large entries.

    Differs from the paper:
        A row holds all weights of one output unit, for convolutions too; a vector is one row.
        Of equal entries in a row, the first has the smaller rank. In a row of one element the probability is density.
    """
    kept = magprune(base, models, rng, density, epsilon, rescale=rescale and gain is None)
    total = weighted_sum(scaled(kept, gain), weight)
    if normalize:
        total = total / weight.sum()
    return base + lambda_ * total
