"""Arcee Fusion: take the most important changes of another model."""

from collections.abc import Sequence

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
    q, p = _exponential(base - base_top), _exponential(after - top)
    step = (after - base) - (top - base_top)
    more = torch.where(step.abs() < _NEAR, q * _exponential_less_1(step), p - q)
    q_sum, excess = q.double().sum(1, keepdim=True), more.double().sum(1, keepdim=True)
    p_sum = q_sum + excess
    # factors that give the normalized p and p - q, times q_sum
    share, shift, small = ((value / p_sum).to(base.dtype) for value in (q_sum, -excess, _SMALL * q_sum * p_sum))
    inverse = 1 / (q + small)
    y, change = (p * share + small) * inverse, (more * share + q * shift) * inverse
    terms = torch.where(change.abs() < _NEAR, _bregman(change), y * _logarithm(y) - change)
    return (((q + small) * terms).double().sum(1, keepdim=True) / q_sum).clamp(min=0)


# from the highest power down; they are those of S. Moshier's Cephes library
_EXPONENTIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_LOGARITHM = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
# ln 2 in two parts: the product of the first one with a whole number is exact
_LN_2 = (0.693359375, -2.12194440e-4)
# added to a float32, it rounds it to a whole number, which the lowest bits of the sum hold
_ROUNDS = 1.5 * 2**23
_SQRT_HALF = 0x3F3504F3


def _exponential(x: Tensor) -> Tensor:
    """Return exp(x) to 1e-7 of it for x up to 0, but at least exp(-87).

    Unlike torch's it has the same bits on every processor, and can be part of a loop in machine code.
    """
    if x.dtype != torch.float32:
        return torch.exp(x)
    x = x.clamp(min=-87)
    rounds = x * 1.44269504 + _ROUNDS
    whole = rounds - _ROUNDS
    x = (x - whole * _LN_2[0]) - whole * _LN_2[1]
    more = _polynomial(x, _EXPONENTIAL)
    power = ((rounds.view(torch.int32) + 127) * (1 << 23)).view(torch.float32)
    return (more * (x * x) + x + 1) * power


def _logarithm(x: Tensor) -> Tensor:
    """Return log(x) to 1e-7 for x above 1e-37."""
    if x.dtype != torch.float32:
        return torch.log(x)
    bits = x.view(torch.int32)
    exponent = (bits - _SQRT_HALF) >> 23
    x = (bits - exponent * (1 << 23)).view(torch.float32) - 1
    more = _polynomial(x, _LOGARITHM)
    square, whole = x * x, exponent.float()
    return x + (x * square * more + whole * _LN_2[1] - 0.5 * square) + whole * _LN_2[0]


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return a polynomial, the coefficient of the highest power first."""
    total = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total * x + coefficient
    return total


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
    version=3,
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
