"""SCE: select elements by variance, calculate weights, erase minority signs."""

from typing import Literal

import torch
from torch import Tensor

from ..method import Fraction, NonNegative, default, merge_method, statistic
from ..ops import agreeing_sum, deltas, elect_sign, not_negative, order_statistic


def spread(models: list[Tensor]) -> Tensor:
    """Return the variance over the models times T^2, float64.

    Computed from the differences to the first model, so that large means do not cancel. For 16-bit weights every step
    is exact, so that equal variances are equal in floating point.
    """
    steps = [(model.double() - models[0].double()) for model in models[1:]]
    total = squares = torch.zeros_like(models[0], dtype=torch.float64)
    for step in steps:
        total, squares = total + step, squares + step * step
    return (len(models) * squares - total * total).clamp(min=0)


def spreads(models: list[Tensor]) -> list[Tensor]:
    """Return the values by which elements are selected, as a list of one tensor."""
    return [spread(models)]


def ranks(positive: Tensor, select_topk: Tensor) -> Tensor:
    """Return the number of selected elements, shape [1, 1]."""
    return (positive * select_topk).floor().to(torch.int64).unsqueeze(1)


def selects(select_topk: float) -> bool:
    """Return whether any element is left out."""
    return select_topk < 1


def select_by_spread(base: Tensor, models: list[Tensor], cut: Tensor | None) -> list[Tensor]:
    """Set the task vectors to 0 where the models agree most."""
    vectors = deltas(base, models)
    if cut is None:
        return vectors
    chosen = not_negative(spread(models) - cut[0, 0])
    return [torch.where(chosen, vector, torch.zeros_like(vector)) for vector in vectors]


def squared_norms(base: Tensor, models: list[Tensor], cut: Tensor | None) -> Tensor:
    """Measure the squared norms of the selected entries, shape [T]."""
    return torch.stack([vector.double().square().sum() for vector in select_by_spread(base, models, cut)])


def shares(measured: Tensor, size: Tensor, floor: Tensor) -> Tensor:
    """Return the weight of each model, shape [T]."""
    energy = measured / size.clamp(min=1)
    total = energy.sum()
    if total == 0 or total < floor:
        return torch.full_like(energy, 1 / len(energy))
    return energy / total


@merge_method(
    family="task vectors",
    cite="wan2024fusechat",
    statistics={
        "cut": order_statistic(spreads, ranks, when=selects),
        "share": statistic(squared_norms, shares),
    },
    mergekit={"floor": 1e-6},
    version=2,
)
def sce(
    base: Tensor,
    models: list[Tensor],
    cut: Tensor | None,
    share: Tensor,
    *,
    select_topk: Fraction = default(1.0),
    select: Literal["delta", "weight"] = "delta",
    floor: NonNegative = default(0.0),
) -> Tensor:
    """Select the elements in which the models differ most, weigh the models by these, erase minority signs.

        select:    delta_i = 0 except at the k elements with the largest variance over the models,
                   k = floor(select_topk * number of elements with a variance above 0)
        calculate: share_i = mean(delta_i^2) / sum_j mean(delta_j^2)
        erase:     delta_i = 0 where its sign is not that of sum_j delta_j
        merged     = base + sum_i share_i * delta_i / (sum of share_i over the delta_i that were not erased)

    Use when:
        Models of different skills were trained from one base, and the weights should follow from how far each moved. Try
        `select_topk: 1` (FuseO1) next to the paper's 0.1, which leaves most of the base unchanged.

    Args:
        select_topk: Share of the elements that is selected. The paper takes 0.1, FuseO1 1.
        select: Whether the selection holds for the task vectors that are merged (delta), or only for the weights
            calculated from them (weight), as in the authors' code.
        floor: The weights are equal if the mean squares add up to less than this; it is also the smallest divisor in
            the formula of merged.

    Differs from the paper:
        The paper can be read in two ways, which give quite different merges where `select_topk` is below 1: that what is
        selected is merged, or that it only gives the weights. `select` says which.
        Elements whose variance equals that of the k-th, to the precision of float32, are all selected.
        An exact tie of the vote elects plus.
    """
    vectors = select_by_spread(base, models, cut if select == "delta" else None)
    total, agreeing = agreeing_sum(vectors, share, elect_sign(vectors), base.dtype)
    return base + total / torch.maximum(agreeing, floor.to(agreeing.dtype))
