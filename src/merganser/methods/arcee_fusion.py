"""Arcee Fusion: take the most important changes of another model."""

import torch
from torch import Tensor

from ..method import merge_method, statistic
from ..ops import order_statistic

# added to every probability, as in the definition
_SMALL = 1e-8
# for arguments below this, the power series below are exact to 2e-8 of their value
_NEAR = 1 / 8
# quartiles and importances are rounded to float32: an importance that equals the threshold is at least this share of it
_EQUAL = 1 - 2**-21


def divergences(base: Tensor, models: list[Tensor]) -> Tensor:
    """Return KL(model's row || base's row), shape [rows, 1], float64, never negative.

    The divergence of nearly equal distributions is a small difference of large sums. In the form
    sum q (y log y - (y - 1)), y = p / q, no sums cancel. Small values of p - q and y log y - (y - 1) are computed by
    power series, so that float32 is enough for the elements (to 2e-7 of the divergence).
    """
    after = models[0]
    base_top, top = base.amax(1, keepdim=True), after.amax(1, keepdim=True)
    # softmax numerators, relative to the largest entry of each row
    q, p = torch.exp(base - base_top), torch.exp(after - top)
    step = (after - base) - (top - base_top)
    more = torch.where(step.abs() < _NEAR, q * _exponential_less_1(step), p - q)
    q_sum, excess = q.double().sum(1, keepdim=True), more.double().sum(1, keepdim=True)
    p_sum = q_sum + excess
    # factors that give the normalized p and p - q, times q_sum
    share, shift, small = ((value / p_sum).to(base.dtype) for value in (q_sum, -excess, _SMALL * q_sum * p_sum))
    inverse = 1 / (q + small)
    y, change = (p * share + small) * inverse, (more * share + q * shift) * inverse
    terms = torch.where(change.abs() < _NEAR, _bregman(change), y * torch.log(y) - change)
    return (((q + small) * terms).double().sum(1, keepdim=True) / q_sum).clamp(min=0)


def _exponential_less_1(x: Tensor) -> Tensor:
    """Return exp(x) - 1 for small x, by its power series."""
    return x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120))))


def _bregman(x: Tensor) -> Tensor:
    """Return (1 + x) log(1 + x) - x for small x, by its power series."""
    return x * x * (1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x * (1 / 30 - x * (1 / 42 - x / 56))))))


def relative(measured: Tensor) -> Tensor:
    """Return the divergences over the largest of them, so that products with them stay in the range of float32."""
    return measured / measured.max().clamp(min=torch.finfo(torch.float64).tiny)


def importance(base: Tensor, models: list[Tensor], divergence: Tensor) -> list[Tensor]:
    """Return |delta| * divergence as a list of one tensor, of which the quartiles are computed."""
    return [(models[0] - base).abs() * divergence]


def quartile_ranks(size: Tensor) -> Tensor:
    """Return the ranks of the quartiles, 1 for the largest: entries floor(q (n - 1)) in ascending order, from 0."""
    quarters = torch.tensor([[0.25, 0.5, 0.75]], dtype=torch.float64)
    return (size - (quarters * (size - 1)).floor()).to(torch.int64)


@merge_method(
    family="task vectors",
    cite="-",
    scope="row",
    models=(1, 1),
    statistics={
        "divergence": statistic(divergences, relative, over="row"),
        "quartiles": order_statistic(importance, quartile_ranks),
    },
    version=2,
)
def arcee_fusion(base: Tensor, models: list[Tensor], divergence: Tensor, quartiles: Tensor) -> Tensor:
    """Take from the model the weights whose change is large and changes the distribution of their row.

        p, q       = softmax(row of the model) + 1e-8, softmax(row of the base) + 1e-8
        importance = |model - base| * sum over the row of p log(p / q)
        threshold  = median + 1.5 * (third quartile - first quartile) of the importance
        merged     = model where importance >= threshold, else base

    Use when:
        Only the outlying changes of one fine-tune should be merged into the base.

    Differs from the paper:
        There is no paper; the method is Arcee's and came with mergekit.
        Importances are float32; one that equals the threshold to 2**-21 is kept.
        The quartiles are exact: entry floor(q (n - 1)) in ascending order. mergekit draws a sample of large tensors.
        A row is all weights of one output unit; for a convolution mergekit takes only the last axis as a row.
    """
    low, middle, high = quartiles[0].double().unbind()
    threshold = ((middle + 1.5 * (high - low)) * _EQUAL).to(base.dtype)
    return torch.where(importance(base, models, divergence)[0] >= threshold, models[0], base)
