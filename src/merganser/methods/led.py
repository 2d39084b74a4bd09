"""LED-Merging: the entries of every task vector that matter to its task, in the expert and in the base, and to no other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method import Fraction, FromData, PerModel, Scale, Weight, default, merge_method
from ..ops import deltas


def elected(scores: Tensor, rate: Tensor) -> Tensor:
    """Return the entries with the highest scores.

    Args:
        scores: Not negative.
        rate: Share of the entries.

    Returns:
        Bool, in the shape of the scores: those not below the k-th largest, with k = rate times their number, rounded down.
        Entries with a score of 0 are not among them.
    """
    count = int(float(rate) * scores.numel())
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.flatten().kthvalue(scores.numel() - count + 1).values
    return (scores >= least) & (scores > 0)


@merge_method(
    family="data",
    cite="ma2025led",
    scope="tensor",
    statistics={
        "gradient": FromData("absolute_gradient"),
        "base_gradient": FromData("absolute_gradient", of="base_on_models"),
    },
    breaks={"identical": "what matters to several models is taken from none"},
)
def led(
    base: Tensor,
    models: list[Tensor],
    gradient: Sequence[Tensor] | None,
    base_gradient: Sequence[Tensor] | None,
    *,
    weight: PerModel[Weight] = default(1.0),
    rate: PerModel[Fraction] = default(0.4),
    lambda_: Scale = default(1.0),
) -> Tensor:
    """Add the entries of every task vector that matter to its task, both in the expert and in the base, and to no other.

        S_i    = |model_i| gradient_i,    B_i = |base| base_gradient_i
        M_i    = top rate_i of S_i within the tensor, and top rate_i of B_i
        D_i    = M_i without all other M_j
        merged = base + lambda sum_i weight_i D_i (model_i - base)

    gradient_i is the sum over sequences of |gradient of the loss| on text of task i in model i, base_gradient_i the same in
    the base.

    Use when:
        One of the experts was trained for safety, and the others must not weaken it. Most of the task vectors is dropped:
        the more models there are, and the larger the rates, the less is left. Expect little of what several experts
        gained; `lambda` above 1 lengthens what is left.

    Args:
        weight: Factor of each task vector.
        rate: Share of the entries of a tensor that are elected for a model. The authors' script has 0.1 for safety, 0.4
            for mathematics and 0.5 for code.
        lambda_: Factor of the sum.

    Differs from the paper:
        The authors' code, as published, replaces the scores of one model by random numbers, for an ablation; here scores
        are those of the paper. Gradients are of whole sequences, one at a time, of the sum of the losses of their tokens;
        the code has the mean over a batch's tokens.
        An entry with a score of 0 is never elected: without that, ties at 0 elect rows of the embedding that no text
        used. A tensor without gradients stays as in the base.
    """
    if gradient is None or base_gradient is None:
        return base.clone()
    masks = [
        elected(model.abs() * own, rate[i]) & elected(base.abs() * before, rate[i])
        for i, (model, own, before) in enumerate(zip(models, gradient, base_gradient, strict=True))
    ]
    claims = sum((mask.to(torch.int16) for mask in masks), torch.zeros_like(base, dtype=torch.int16))
    total = torch.zeros_like(base)
    for i, (delta, mask) in enumerate(zip(deltas(base, models), masks, strict=True)):
        total = total + torch.where(mask & (claims == 1), delta * weight[i], 0.0)
    return base + lambda_ * total
