"""The sign vote and the disjoint mean of TIES."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sum import not_negative


def vote(tensors: Sequence[Tensor], weight: Tensor | None = None) -> Tensor:
    """Return the weighted sum whose sign is elected.

    Computed in float64: a vote decided by rounding error would replace one model's entry by another's.

    Args:
        tensors: Task vectors, already trimmed.
        weight: One entry per tensor, shape [T], float64; all 1 if None.
    """
    wide = [tensor.double() for tensor in tensors]
    if weight is not None:
        wide = [tensor * weight[i] for i, tensor in enumerate(wide)]
    total = wide[0]
    for tensor in wide[1:]:
        total = total + tensor
    return total


def elect_sign(tensors: Sequence[Tensor], weight: Tensor | None = None, tie: Tensor | None = None) -> Tensor:
    """Return the elected sign, that of the weighted sum, for each element: True for plus.

    Args:
        tensors: Task vectors, already trimmed.
        weight: One entry per tensor, shape [T], float64; all 1 if None.
        tie: Sign of an exact tie, 0-d: plus if this is above 0, else minus; plus if None.
    """
    total = vote(tensors, weight)
    if tie is None:
        return not_negative(total)
    return torch.where(tie > 0, not_negative(total), ~not_negative(-total))


def agreeing_sum(
    tensors: Sequence[Tensor], weight: Tensor, positive: Tensor, dtype: torch.dtype, *, count: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the sum of the weighted entries that have the elected sign, and the sum of their weights.

    Args:
        tensors: Task vectors, already trimmed.
        weight: One entry per tensor, shape [T].
        positive: The elected signs, as from `elect_sign`.
        dtype: Dtype of the sums.
        count: Whether to sum the weights.

    Returns:
        `sum_i weight[i] * tensors[i]` and `sum_i weight[i]` over the agreeing entries; the latter is 1 where it would
        be 0, or if `count` is False.
    """
    zero, one = torch.zeros_like(tensors[0], dtype=dtype), torch.ones_like(tensors[0], dtype=dtype)
    total, weights = zero, zero
    for i, tensor in enumerate(tensors):
        weighted = tensor.to(dtype) * weight[i]
        agrees = torch.where(positive, weighted > 0, weighted < 0)
        total = total + torch.where(agrees, weighted, zero)
        if count:
            weights = weights + torch.where(agrees, one * weight[i], zero)
    return total, torch.where(weights == 0, one, weights) if count else one


def agreeing_largest(tensors: Sequence[Tensor], weight: Tensor, positive: Tensor, *, normalize: bool) -> Tensor:
    """Return the largest of the weighted entries that have the elected sign, element by element; 0 where none has.

    Args:
        tensors: Task vectors, already trimmed.
        weight: One entry per tensor, shape [T].
        positive: The elected signs, as from `elect_sign`.
        normalize: Compare and return the entries without multiplying them by their weights.
    """
    largest = torch.zeros_like(tensors[0])
    for i, tensor in enumerate(tensors):
        weighted = tensor * weight[i]
        agrees = torch.where(positive, weighted > 0, weighted < 0)
        entry = tensor if normalize else weighted
        largest = torch.where(agrees & (entry.abs() > largest.abs()), entry, largest)
    return largest


def disjoint_mean(tensors: Sequence[Tensor], weight: Tensor, dtype: torch.dtype, *, normalize: bool) -> Tensor:
    """Elect the sign of each element and average the entries that have it.

    Args:
        tensors: Task vectors, already trimmed.
        weight: One entry per tensor, used in the vote and in the mean, shape [T], float64.
        dtype: Dtype of the mean. The vote is in float64, from the unrounded tensors.
        normalize: Divide by the sum of the weights of the added entries (1 if none was added, or if they cancel);
            otherwise return the sum.
    """
    total, weights = agreeing_sum(tensors, weight, elect_sign(tensors, weight), dtype, count=normalize)
    return total / weights if normalize else total
