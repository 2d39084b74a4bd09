"""TIES: trim, elect sign, disjoint mean."""

from typing import Literal

from torch import Tensor

from ..method import Fraction, PerModel, Scale, Weight, default, merge_method, statistic
from ..ops import (
    agreeing_largest,
    agreeing_sum,
    delta_magnitudes,
    deltas,
    elect_sign,
    l1_gain,
    l1_norms,
    magnitude_cut,
    scaled,
    trim,
    vote,
)


def norms(base: Tensor, models: list[Tensor], cut: Tensor | None) -> Tensor:
    """Measure the L1 norms before and after the trim, shape [2, T]."""
    return l1_norms(deltas(base, models), trim(base, models, cut))


def plus_votes(base: Tensor, models: list[Tensor], cut: Tensor | None, gain: Tensor | None, weight: Tensor) -> Tensor:
    """Count the elements that elect plus minus those that elect minus, int64."""
    total = vote(scaled(trim(base, models, cut), gain), weight)
    return (total > 0).sum() - (total < 0).sum()


def elected(measured: Tensor) -> Tensor:
    """Return the sign that exact ties elect, 0-d: 1 for plus, -1 or 0 for minus."""
    return measured.sign()


def by_majority(tie: str) -> bool:
    """Return whether exact ties are decided by the majority of all elements."""
    return tie == "majority"


@merge_method(
    family="task vectors",
    cite="yadav2023ties",
    statistics={
        "cut": magnitude_cut(delta_magnitudes, over="trim_over"),
        "gain": statistic(norms, l1_gain, when="rescale"),
        "majority": statistic(plus_votes, elected, over="model", when=by_majority),
    },
)
def ties(
    base: Tensor,
    models: list[Tensor],
    cut: Tensor | None,
    gain: Tensor | None,
    majority: Tensor | None,
    *,
    weight: PerModel[Weight],
    density: PerModel[Fraction] = default(1.0),
    lambda_: Scale = default(1.0),
    normalize: bool = True,
    rescale: bool = False,
    trim_over: Literal["tensor", "model"] = "tensor",
    tie: Literal["plus", "majority"] = "plus",
    merge: Literal["sum", "max"] = "sum",
) -> Tensor:
    """Trim the task vectors, elect a sign per element, average those that agree.

        cut_i    = k-th largest |delta_i|, k = floor(density_i * size)
        trimmed  = delta_i where |delta_i| >= cut_i, else 0
        sign     = + where sum_i weight_i * trimmed_i >= 0, else -
        merged   = base + lambda * (sum of weight_i * trimmed_i with that sign) / (sum of their weight_i)

    Use when:
        The fine-tunes were trained on clearly different tasks and their task vectors disagree in sign.

    Args:
        weight: Factor of each task vector, in the vote and in the mean.
        density: Share of each task vector that is kept, the largest entries. The paper keeps 0.2.
        lambda_: Factor of the merged task vector.
        normalize: Divide by the sum of the weights that agree (a mean), instead of adding (a sum). With `merge: max`,
            compare and take the entries without their weights.
        rescale: Scale each trimmed task vector back to the L1 norm that it had before the trim.
        trim_over: Rank the entries inside each tensor, or over the whole model as the paper does.
        tie: Sign that an exact tie of the vote elects: plus, or the sign that most elements of the model elect, as in
            the authors' code (minus, if both signs have equally many).
        merge: Take the sum (the mean, with normalize) of the entries that agree, or the largest of them.

    Differs from the paper:
        The paper has no weights; equal weights give its formula.
        The paper's own settings are density 0.2, `trim_over: model` and `tie: majority`, with a mean.
        All entries whose magnitude equals the cut are kept, and at least one is kept unless the density is 0; the
        authors' code keeps one entry more.
    """
    trimmed = scaled(trim(base, models, cut), gain)
    positive = elect_sign(trimmed, weight, majority)
    if merge == "max":
        return base + lambda_ * agreeing_largest(trimmed, weight, positive, normalize=normalize)
    total, weights = agreeing_sum(trimmed, weight, positive, base.dtype, count=normalize)
    return base + lambda_ * (total / weights if normalize else total)
