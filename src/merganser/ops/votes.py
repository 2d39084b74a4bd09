"""The sign vote and the disjoint mean of TIES."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sum import not_negative


def vote(tensors: Sequence[Tensor], weight: Tensor | None = None) -> Tensor:
    """Return the weighted sum whose sign is elected.

    It is formed in float64: a vote that is decided by rounding would replace one model's entry by another's.

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
    """Elect the sign of the weighted sum, element by element: True for plus.

    Args:
        tensors: Task vectors, already trimmed.
        weight: One entry per tensor, shape [T], float64; all 1 if None.
        tie: What an exact tie elects, 0-d: plus where this is above 0, else minus; plus if None.
    """
    total = vote(tensors, weight)
    if tie is None:
        return not_negative(total)
    return torch.where(tie > 0, not_negative(total), ~not_negative(-total))


def agreeing_sum(
    tensors: Sequence[Tensor], weight: Tensor, positive: Tensor, dtype: torch.dtype, *, count: bool = True
) -> tuple[Tensor, Tensor]:
    """Add the weighted entries that have the elected sign, and their weights.

    Args:
        tensors: Task vectors, already trimmed.
        weight: One entry per tensor, shape [T].
        positive: The elected signs, as from `elect_sign`.
        dtype: In which they are added.
        count: Whether the weights are wanted.

    Returns:
        `sum_i weight[i] * tensors[i]` and `sum_i weight[i]` over the agreeing entries; the latter is 1 where it would
        be 0, or where it is not wanted.
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
        normalize: Compare and return the entries without their weights.
    """
    largest = torch.zeros_like(tensors[0])
    for i, tensor in enumerate(tensors):
        weighted = tensor * weight[i]
        agrees = torch.where(positive, weighted > 0, weighted < 0)
        entry = tensor if normalize else weighted
        largest = torch.where(agrees & (entry.abs() > largest.abs()), entry, largest)
    return largest


def disjoint_mean(tensors: Sequence[Tensor], weight: Tensor, dtype: torch.dtype, *, normalize: bool) -> Tensor:
    """Elect signs and average the entries that have them.

    Args:
        tensors: Task vectors, already trimmed.
        weight: One entry per tensor, in the vote and in the mean, shape [T], float64.
        dtype: Of the mean. The vote is in float64, and sees what the tensors hold beyond this.
        normalize: Divide by the sum of the weights of the entries that were added (1 where none was, or where they
            cancel); otherwise their sum is returned.
    """
    total, weights = agreeing_sum(tensors, weight, elect_sign(tensors, weight), dtype, count=normalize)
    return total / weights if normalize else total
