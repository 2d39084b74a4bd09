"""Arcee Fusion: take over the changes that matter most."""

import torch
from torch import Tensor

from ..method import merge_method, statistic
from ..ops import order_statistic

# added to every probability, as in the definition
_SMALL = 1e-8
# below it the series are exact to 2e-8 of their value
_NEAR = 1 / 8
# the quartiles and the importances are rounded to float32, so an entry that equals the threshold reaches this share of it
_EQUAL = 1 - 2**-21


def divergences(base: Tensor, models: list[Tensor]) -> Tensor:
    """Return KL(model's row || base's row), shape [rows, 1], float64, never negative.

    The divergence of nearly equal distributions is the small difference of large sums. In the form
    sum q (y log y - (y - 1)), y = p / q, no sums cancel. What is small itself, p - q and y log y - (y - 1), comes from
    its series, so that float32 does for the elements (to 2e-7 of the divergence).
    """
    after = models[0]
    base_top, top = base.amax(1, keepdim=True), after.amax(1, keepdim=True)
    # not normalized: relative to the largest of each
    q, p = torch.exp(base - base_top), torch.exp(after - top)
    step = (after - base) - (top - base_top)
    more = torch.where(step.abs() < _NEAR, q * _exponential_less_1(step), p - q)
    q_sum, excess = q.double().sum(1, keepdim=True), more.double().sum(1, keepdim=True)
    p_sum = q_sum + excess
    # p and p - q as they are normalized, times q_sum
    share, shift, small = ((value / p_sum).to(base.dtype) for value in (q_sum, -excess, _SMALL * q_sum * p_sum))
    inverse = 1 / (q + small)
    y, change = (p * share + small) * inverse, (more * share + q * shift) * inverse
    terms = torch.where(change.abs() < _NEAR, _bregman(change), y * torch.log(y) - change)
    return (((q + small) * terms).double().sum(1, keepdim=True) / q_sum).clamp(min=0)


def _exponential_less_1(x: Tensor) -> Tensor:
    """Return exp(x) - 1 of small numbers."""
    return x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120))))


def _bregman(x: Tensor) -> Tensor:
    """Return (1 + x) log(1 + x) - x of small numbers."""
    return x * x * (1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x * (1 / 30 - x * (1 / 42 - x / 56))))))


def relative(measured: Tensor) -> Tensor:
    """Solve for the divergences as shares of the largest: products with them stay among float32's numbers."""
    return measured / measured.max().clamp(min=torch.finfo(torch.float64).tiny)


def importance(base: Tensor, models: list[Tensor], divergence: Tensor) -> list[Tensor]:
    """Return |delta| * divergence, one tensor: what the quartiles are taken of."""
    return [(models[0] - base).abs() * divergence]


def quartile_ranks(size: Tensor) -> Tensor:
    """Return the ranks, counted from the largest, of the entries floor(q (n - 1)) in ascending order."""
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
    """Take over from the other model the weights whose change is large and changes the distribution of their row.

        p, q       = softmax(row of the model) + 1e-8, softmax(row of the base) + 1e-8
        importance = |model - base| * sum over the row of p log(p / q)
        threshold  = median + 1.5 * (third quartile - first quartile) of the importance
        merged     = model where importance >= threshold, else base

    Use when:
        One fine-tune, of which only the outlying changes are to be taken over.

    Differs from the paper:
        There is no paper; the method is Arcee's and came with mergekit.
        Importances are float32; one that equals the threshold to 2**-21 is kept.
        The quartiles are exact: entry floor(q (n - 1)) in ascending order. mergekit draws a sample of large tensors.
        A row is all weights of one output unit; of a convolution mergekit takes the last axis alone.
    """
    low, middle, high = quartiles[0].double().unbind()
    threshold = ((middle + 1.5 * (high - low)) * _EQUAL).to(base.dtype)
    return torch.where(importance(base, models, divergence)[0] >= threshold, models[0], base)
