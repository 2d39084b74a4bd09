"""Consensus merging: keep the elements that TALL masks assign to several tasks."""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..method import Fraction, Number, PerModel, Scale, Weight, default, merge_method
from ..ops import delta_magnitudes, deltas, disjoint_mean, magnitude_cut, tall_mask, trim, weighted_sum

MaskLambda = Annotated[Tensor, Number(0.0, search=(0.2, 0.6))]
Tasks = Annotated[int, Number(0, search=(1, 3))]


def trims(vector: str, density: tuple[float, ...]) -> bool:
    """Return whether the merged task vector needs a cut: TIES trims at least one task vector."""
    return vector == "ties" and any(value < 1 for value in density)


@merge_method(
    family="task vectors",
    cite="wang2024tall",
    statistics={"cut": replace(magnitude_cut(delta_magnitudes, over="trim_over"), when=trims)},
    breaks={"identical": "task vectors are added, not averaged"},
)
def consensus(
    base: Tensor,
    models: list[Tensor],
    cut: Tensor | None,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    mask_lambda: PerModel[MaskLambda] = default(0.4),
    k: Tasks = 2,
    vector: Literal["sum", "ties"] = "sum",
    density: PerModel[Fraction] = default(0.2),
    trim_over: Literal["tensor", "model"] = "tensor",
) -> Tensor:
    """Add the task vectors, and keep the elements that matter to several of the tasks.

        delta_i = weight_i * (model_i - base)
        tau     = sum_i delta_i, or their merge by TIES
        mask_i  = 1 where |delta_i| > mask_lambda_i * |tau - delta_i|, else 0
        merged  = base + lambda * tau where sum_i mask_i >= k, base elsewhere

    Use when:
        Three or more fine-tunes are merged, and changes that serve only one task or none make their sum worse.
        Try lambda 0.3 to 1, and mask_lambda 0.2 to 0.6: the larger, the fewer elements belong to a model.

    Args:
        weight: Factor of each task vector.
        lambda_: Factor of the merged task vector, alpha in the paper.
        mask_lambda: An element matters to a model if its change exceeds this share of the sum of the other models'
            changes. The paper chooses it for each task on its validation data, from 0.2 to 0.6.
        k: Number of models that an element must matter to. 1 removes elements that matter to none, 2 also those that
            matter to one; 0 removes nothing.
        vector: Whether the merged task vector is the plain sum, or the sum that TIES computes.
        density: Share of each task vector that TIES keeps; without effect on the plain sum.
        trim_over: Whether TIES ranks entries inside each tensor, or over the whole model as the paper does.

    Differs from the paper:
        The paper has no weights; equal ones give its formula.
        With `vector: ties`, all entries whose magnitude equals the cut are kept, and a tie of the vote elects plus.
    """
    wide = [delta.double() for delta in deltas(base, models)]
    if vector == "sum":
        total = weighted_sum(wide, weight)
    else:
        total = disjoint_mean(trim(base, models, cut), weight, torch.float64, normalize=False)
    count = torch.zeros_like(total)
    for i, own in enumerate(wide):
        count = count + tall_mask(own * weight[i], total, mask_lambda[i])
    kept = torch.where(count >= k, total, torch.zeros_like(total))
    return base + lambda_ * kept.to(base.dtype)
