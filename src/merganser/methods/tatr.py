"""TATR: task arithmetic without the elements in which several task vectors are large."""

from typing import Literal

import torch
from torch import Tensor

from ..method import Fraction, PerModel, Scale, Weight, default, merge_method
from ..ops import order_statistic, weighted_sum
from ..ops.order import comparable


def changes(base: Tensor, models: list[Tensor]) -> list[Tensor]:
    """Return the task vectors, float64, so that rounding does not decide what is left out."""
    return [model.double() - base.double() for model in models]


def sensitivity(vectors: list[Tensor]) -> Tensor:
    """Return the square root of Omega, float64, cut to the precision at which order statistics compare it.

    The root has the same order, and stays in the range of float32 wherever the task vectors do.
    """
    before = torch.zeros_like(vectors[0])
    pairs = torch.zeros_like(vectors[0])
    for vector in vectors:
        size = vector.abs()
        pairs = pairs + size * before
        before = before + size
    return comparable((2 * pairs).sqrt())


def sensitivities(base: Tensor, models: list[Tensor]) -> list[Tensor]:
    """Return the values that are ranked."""
    return [sensitivity(changes(base, models))]


def left_out(quantile: Tensor, size: Tensor) -> Tensor:
    """Return the number of elements outside the trust region, shape [1, 1]."""
    return (size - (quantile * size).floor()).to(torch.int64).reshape(1, 1)


@merge_method(
    family="task vectors",
    cite="sun2025tatr",
    statistics={"cut": order_statistic(sensitivities, left_out, over="trim_over")},
    breaks={"identical": "task vectors are added, not averaged"},
)
def tatr(
    base: Tensor,
    models: list[Tensor],
    cut: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    quantile: Fraction = default(0.99),
    trim_over: Literal["tensor", "model"] = "model",
) -> Tensor:
    """Add the task vectors, except where several of them are large.

        delta_i = model_i - base
        Omega   = sum over i != j of |delta_i| * |delta_j|
        cut     = k-th largest Omega, k = size - floor(quantile * size)
        merged  = base where Omega >= cut and Omega > 0, base + lambda * sum_i weight_i * delta_i elsewhere

    A task vector stands in for the gradient of its task, so that Omega estimates how much the loss of each task reacts to
    the changes that the other tasks make.

    Use when:
        Task arithmetic of several fine-tunes loses skills because they change the same elements. Try quantiles from 0.9
        to 0.999, and lambda as for task arithmetic.

    Args:
        weight: Factor of each task vector; Omega does not depend on it.
        lambda_: Factor of the merged task vector.
        quantile: Share of the elements that stay in the trust region, those with the smallest Omega; 1 is task
            arithmetic.
        trim_over: Rank Omega over the whole model, as the paper does, or inside each tensor, which reads the inputs less
            often.

    Differs from the paper:
        This is its zero-shot variant; the other one takes gradients of the base on data of each task. The formula and
        the default quantile were compared with FusionBench's code, not with the paper's own.
        Elements with an Omega of 0 always stay: only one model changed them, if any. There, where most elements are of
        that kind, the published rule leaves all of them out; of one model alone it leaves the base.
        A quantile of 1 leaves nothing out, where published code leaves out the largest Omega.
        Omega is compared with the 24 bits of float32; elements that are equal to the cut are left out, as published.
        The paper also combines the trust region with other methods than task arithmetic.
    """
    vectors = changes(base, models)
    of_vectors = sensitivity(vectors)
    total = weighted_sum(vectors, weight)
    zero = torch.zeros_like(total)
    kept = torch.where(of_vectors > 0, torch.where(of_vectors >= cut[0, 0], zero, total), total)
    return base + lambda_ * kept.to(base.dtype)
