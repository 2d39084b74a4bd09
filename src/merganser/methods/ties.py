"""TIES: trim, elect sign, disjoint mean."""

from typing import Literal

from torch import Tensor

from ..method import Fraction, PerModel, Scale, Weight, default, merge_method, statistic
from ..ops import delta_magnitudes, deltas, disjoint_mean, l1_gain, l1_norms, magnitude_cut, scaled, trim


def norms(base: Tensor, models: list[Tensor], cut: Tensor | None) -> Tensor:
    """Measure the L1 norms before and after the trim, shape [2, T]."""
    return l1_norms(deltas(base, models), trim(base, models, cut))


@merge_method(
    family="task vectors",
    cite="yadav2023ties",
    statistics={
        "cut": magnitude_cut(delta_magnitudes, over="trim_over"),
        "gain": statistic(norms, l1_gain, when="rescale"),
    },
)
def ties(
    base: Tensor,
    models: list[Tensor],
    cut: Tensor | None,
    gain: Tensor | None,
    *,
    weight: PerModel[Weight],
    density: PerModel[Fraction] = default(1.0),
    lambda_: Scale = default(1.0),
    normalize: bool = True,
    rescale: bool = False,
    trim_over: Literal["tensor", "model"] = "tensor",
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
        normalize: Divide by the sum of the weights that agree (a mean), instead of adding (a sum).
        rescale: Scale each trimmed task vector back to the L1 norm that it had.
        trim_over: Rank the entries inside each tensor, or over the whole model as the paper does.

    Differs from the paper:
        The paper has no weights; equal weights give its formula.
        The default trims per tensor; `trim_over: model` is the paper's.
        Entries whose magnitude equals the cut are all kept, and at least one is unless the density is 0.
        An exact tie of the vote elects plus; the authors' code takes the majority sign of the whole model.
    """
    trimmed = scaled(trim(base, models, cut), gain)
    return base + lambda_ * disjoint_mean(trimmed, weight, base.dtype, normalize=normalize)
