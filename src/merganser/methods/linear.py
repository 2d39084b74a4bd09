"""Linear: weighted average of the models."""

from torch import Tensor

from ..method import PerModel, Weight, merge_method
from ..ops import check_total, weighted_sum


@merge_method(family="averages", cite="wortsman2022soups", validate=check_total)
def linear(models: list[Tensor], *, weight: PerModel[Weight], normalize: bool = True) -> Tensor:
    """Average the models, each counted with its weight.

        merged = sum_i weight_i * model_i          (over sum_i weight_i when normalize)

    Use when:
        The models are checkpoints of one run, or fine-tunes that stayed close to each other.

    Args:
        weight: Share of each model.
        normalize: Divide by the sum of the weights, so they need not add up to 1.

    Differs from the paper:
        Nothing for equal weights (the uniform soup).
    """
    total = weighted_sum(models, weight)
    return total / weight.sum() if normalize else total
