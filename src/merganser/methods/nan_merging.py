"""NAN: task arithmetic in which the shorter of the task vectors count more."""

from typing import Literal

from torch import Tensor

from ..method import Scale, default, merge_method, statistic
from ..ops import deltas, inverse_norms, shares, squared_norms, weighted_sum


def inverse_shares(squares: Tensor) -> Tensor:
    """Return the shares of the task vectors from their squared norms, shape [T]; 0 for one of zeros beside others."""
    return shares(inverse_norms(squares.sqrt()))


@merge_method(
    family="task vectors",
    cite="si2025nan",
    statistics={"factor": statistic(squared_norms, inverse_shares, over="norms_over")},
)
def nan_merging(
    base: Tensor,
    models: list[Tensor],
    factor: Tensor,
    *,
    lambda_: Scale = default(1.0),
    norms_over: Literal["model", "tensor"] = "model",
) -> Tensor:
    """Average the task vectors, each with a weight in proportion to the inverse of its norm.

        factor_i = (1 / |delta_i|) / sum_j (1 / |delta_j|)
        merged   = base + lambda * sum_i factor_i * delta_i

    Use when:
        Fine-tunes changed the base by very different amounts, and the longest task vector should not outweigh the others:
        here all get the same length. MetaGPT does the opposite: its factors grow with the norm.

    Args:
        lambda_: Factor of the average.
        norms_over: Compute the norms over the whole model, or for each tensor separately.

    Differs from the paper:
        Not checked, because neither the full text nor a program of the authors was available: whether its norms are those
        of the task vectors as here (its abstract says "parameter norm"), whether over the model or for each layer, and
        whether it scales the average by more than 1 for many models.
        A model that did not change has the factor 0, and leaves those of the others alone.
    """
    return base + lambda_ * weighted_sum(deltas(base, models), factor)
