"""Arcee Fusion: take over the changes that matter most."""

import torch
from torch import Tensor

from ..method import merge_method
from ..ops import order_statistic

# added to every probability, as in the definition
_SMALL = 1e-8
# the quartiles are exact to 2**-36, so an entry that equals the threshold is one that reaches this share of it
_EQUAL = 1 - 2**-34


def importance(base: Tensor, models: list[Tensor]) -> Tensor:
    """Return |delta| * KL(model's row || base's row), float64, never negative.

    The divergence of nearly equal distributions is the small difference of large sums. In the form
    sum q (y log y - (y - 1)), y = p / q, no sums cancel, and an error in normalising enters squared.
    """
    before, after = base.double(), models[0].double()
    q, q_sum = _exponentials(base)
    p, p_sum = _exponentials(models[0])
    # p and q times q_sum, which saves divisions
    q = q + _SMALL * q_sum
    y = (p * (q_sum / p_sum) + _SMALL * q_sum) / q
    divergence = ((q * (y * torch.log(y) - (y - 1))).sum(1, keepdim=True) / q_sum).clamp(min=0)
    return (after - before).abs() * divergence


def _exponentials(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(value - largest of the row), float64, and its sum over each row, shape [rows, 1]."""
    found = torch.exp(values.double() - values.amax(1, keepdim=True).double())
    return found, found.sum(1, keepdim=True)


def ranked(base: Tensor, models: list[Tensor]) -> list[Tensor]:
    """Return what the quartiles are taken of."""
    return [importance(base, models)]


def quartile_ranks(size: Tensor) -> Tensor:
    """Return the ranks, counted from the largest, of the entries floor(q (n - 1)) in ascending order."""
    quarters = torch.tensor([[0.25, 0.5, 0.75]], dtype=torch.float64)
    return (size - (quarters * (size - 1)).floor()).to(torch.int64)


@merge_method(
    family="task vectors",
    cite="-",
    scope="row",
    models=(1, 1),
    statistics={"quartiles": order_statistic(ranked, quartile_ranks, wide=True)},
)
def arcee_fusion(base: Tensor, models: list[Tensor], quartiles: Tensor) -> Tensor:
    """Take over from the other model the weights whose change is large and changes the distribution of their row.

        p, q       = softmax(row of the model) + 1e-8, softmax(row of the base) + 1e-8
        importance = |model - base| * sum over the row of p log(p / q)
        threshold  = median + 1.5 * (third quartile - first quartile) of the importance
        merged     = model where importance >= threshold, else base

    Use when:
        One fine-tune, of which only the outlying changes are to be taken over.

    Differs from the paper:
        There is no paper; the method is Arcee's and came with mergekit.
        An entry that equals the threshold is kept, as in exact arithmetic.
        The quartiles are exact: entry floor(q (n - 1)) in ascending order. mergekit draws a sample of large tensors.
        A row is all weights of one output unit; of a convolution mergekit takes the last axis alone.
    """
    low, middle, high = quartiles[0].view(torch.float64).unbind()
    keep = importance(base, models) >= (middle + 1.5 * (high - low)) * _EQUAL
    return torch.where(keep, models[0], base)
