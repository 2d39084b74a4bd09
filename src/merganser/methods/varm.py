"""VaRM: average of models, weighted by how much each of them changed a tensor."""

from typing import Literal

import torch
from torch import Tensor

from ..method import merge_method, statistic
from ..ops import deltas, shares, weighted_sum


def size_of(change: Tensor, variation: str) -> Tensor:
    """Return the size of each change: its square or its absolute value."""
    return change * change if variation == "square" else change.abs()


def variations(base: Tensor, models: list[Tensor], variation: str) -> Tensor:
    """Measure how much each model changed a block, shape [T]."""
    return torch.stack([size_of(vector.double(), variation).sum() for vector in deltas(base, models)])


def of_tensor(by: str) -> bool:
    """Return whether the shares are per tensor, instead of per element."""
    return by == "tensor"


def element_shares(vectors: list[Tensor], variation: str) -> list[Tensor]:
    """Return each model's share of every element, 0 where no model changed it."""
    largest = torch.stack([vector.abs() for vector in vectors]).amax(dim=0)
    # divide by the largest first, because squares of small changes would underflow to 0
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
    """Average the models; in each tensor, the weight of a model is its share of the squared changes of all models.

        share_i = mean(delta_i^2) / sum_j mean(delta_j^2)
        merged  = base + sum_i share_i * delta_i = sum_i share_i * model_i

    Use when:
        Models of different skills were trained from one base, and each should dominate where it changed most. It is SCE
        without select and erase.

    Args:
        variation: Whether to sum the squares of the changes, or their absolute values.
        by: Compute shares for each tensor, or for each element.

    Differs from the paper:
        The authors' released script reads the changes of one model for all of them, so that its shares are equal; this
        follows the paper. The script can also group the tensors of a layer or of a kind; this method cannot.
    """
    vectors = deltas(base, models)
    if share is not None:
        return base + weighted_sum(vectors, share)
    return base + sum(own * vector for own, vector in zip(element_shares(vectors, variation), vectors, strict=True))
