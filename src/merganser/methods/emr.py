"""EMR: elect a unified task vector."""

from torch import Tensor

from ..method import merge_method
from ..ops import deltas, elect_largest


@merge_method(family="sidecars", cite="huang2024emr")
def emr(base: Tensor, models: list[Tensor]) -> Tensor:
    """Elect the sign of the sum of the task vectors, and the largest entry that has it.

        sign   = + where sum_i delta_i > 0, else -
        merged = base + sign * max_i |delta_i| over the models whose delta_i has that sign

    Use when:
        Several fine-tunes are to share one model and still be told apart: masks and factors restore each of them.
        The merged model alone is not what the paper evaluates.

    Differs from the paper:
        Nothing; the sum is formed in float64, so that rounding does not elect.
    """
    return base + elect_largest(deltas(base, models))
