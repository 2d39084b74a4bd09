"""MetaGPT: task arithmetic with factors in closed form."""

from typing import Literal

from torch import Tensor

from ..method import merge_method, statistic
from ..ops import deltas, shares, squared_norms, weighted_sum


@merge_method(
    family="task vectors",
    cite="zhou2024metagpt",
    statistics={"factor": statistic(squared_norms, shares, over="norms_over")},
)
def metagpt(
    base: Tensor, models: list[Tensor], factor: Tensor, *, norms_over: Literal["model", "tensor"] = "model"
) -> Tensor:
    """Add the task vectors, each with a factor that follows from its norm.

        factor_i = |delta_i|^2 / sum_j |delta_j|^2
        merged   = base + sum_i factor_i * delta_i

    Use when:
        Task vectors should be added, and there is no data to choose their factors.

    Args:
        norms_over: Compute the norms over the whole model as the paper does, or for each tensor separately.

    Differs from the paper:
        Nothing. Its derivation assumes a model that is linear around the base, and orthogonal task vectors.
    """
    return base + weighted_sum(deltas(base, models), factor)
