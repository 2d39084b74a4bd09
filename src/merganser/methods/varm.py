"""VaRM: average by how much each model changed a tensor."""

from typing import Literal

import torch
from torch import Tensor

from ..method import merge_method, statistic
from ..ops import deltas, shares, weighted_sum


def size_of(change: Tensor, variation: str) -> Tensor:
    """Return what changes count, not negative."""
    return change * change if variation == "square" else change.abs()


def variations(base: Tensor, models: list[Tensor], variation: str) -> Tensor:
    """Measure how much each model changed a block, shape [T]."""
    return torch.stack([size_of(vector.double(), variation).sum() for vector in deltas(base, models)])


def of_tensor(by: str) -> bool:
    """Say whether a tensor has one share for each model."""
    return by == "tensor"


def element_shares(vectors: list[Tensor], variation: str) -> list[Tensor]:
    """Return each model's share of every element, 0 where none changed it."""
    largest = torch.stack([vector.abs() for vector in vectors]).amax(dim=0)
    # relative to the largest, as squares of small changes are 0
    amounts = [size_of(vector / torch.where(largest > 0, largest, 1.0), variation) for vector in vectors]
    total = amounts[0]
    for amount in amounts[1:]:
        total = total + amount
    return [amount / torch.where(total > 0, total, 1.0) for amount in amounts]


@merge_method(
    family="task vectors",
    cite="wan2024varm",
    statistics={"share": statistic(variations, shares, when=of_tensor)},
)
def varm(
    base: Tensor,
    models: list[Tensor],
    share: Tensor | None,
    *,
    variation: Literal["square", "abs"] = "square",
    by: Literal["tensor", "element"] = "tensor",
) -> Tensor:
    """Average the models, each counted in a tensor with its part in what changed there.

        share_i = mean(delta_i^2) / sum_j mean(delta_j^2)
        merged  = base + sum_i share_i * delta_i = sum_i share_i * model_i

    Use when:
        Models of different skills were trained from one base, and each should lead where it learned most. It is SCE
        without select and erase.

    Args:
        variation: Whether the squares of the changes count, or their absolute values.
        by: Find shares for each tensor, or for each element by itself.

    Differs from the paper:
        The authors' released script reads the changes of one model for all of them, so that its shares come out equal;
        this is what the paper says. It can also group the tensors of a layer or of a kind, which is not offered here.
    """
    vectors = deltas(base, models)
    if share is not None:
        return base + weighted_sum(vectors, share)
    return base + sum(own * vector for own, vector in zip(element_shares(vectors, variation), vectors, strict=True))
