"""The sign vote and the disjoint mean of TIES."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sum import normalizer


def elect_sign(tensors: Sequence[Tensor]) -> Tensor:
    """Elect the sign of the sum, element by element: True for plus. An exact tie elects plus."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total >= 0


def disjoint_mean(tensors: Sequence[Tensor], weight: Tensor, positive: Tensor, *, normalize: bool) -> Tensor:
    """Add the entries that have the elected sign, `weight[i] * tensors[i]`.

    Args:
        tensors: Task vectors, already trimmed.
        weight: One entry per tensor, shape [T].
        positive: The elected signs, as from `elect_sign` over the weighted tensors.
        normalize: Divide by the sum of the weights of the entries that were added (1 where none was, or where they
            cancel).
    """
    zero = torch.zeros_like(tensors[0])
    total, count = zero, zero
    for i, tensor in enumerate(tensors):
        weighted = tensor * weight[i]
        agrees = torch.where(positive, weighted > 0, weighted < 0)
        total = total + torch.where(agrees, weighted, zero)
        if normalize:
            count = count + torch.where(agrees, weight[i].expand_as(zero), zero)
    return total / normalizer(count) if normalize else total
