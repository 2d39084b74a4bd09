"""Task arithmetic: add scaled task vectors to the base."""

from torch import Tensor

from ..method import Ignored, PerModel, Scale, Weight, default, merge_method
from ..ops import check_total, deltas, weighted_sum


@merge_method(
    family="task vectors",
    cite="ilharco2023task",
    mergekit={"density": Ignored("nothing is trimmed"), "rescale": Ignored("nothing is dropped")},
    validate=check_total,
)
def task_arithmetic(
    base: Tensor,
    models: list[Tensor],
    *,
    weight: PerModel[Weight],
    lambda_: Scale = default(1.0),
    normalize: bool = False,
) -> Tensor:
    """Add the weighted task vectors to the base.

        merged = base + lambda * sum_i weight_i * (model_i - base)

    Use when:
        You do not know which method to use. It is the one that large studies on language models found reliable; try
        lambda 0.3 to 1.

    Args:
        weight: Factor of each task vector; a negative one forgets the task.
        lambda_: Factor of the sum.
        normalize: Divide the sum by the sum of the weights.

    Differs from the paper:
        The paper has one factor for all task vectors: lambda here, with weight 1.
    """
    total = weighted_sum(deltas(base, models), weight)
    if normalize:
        total = total / weight.sum()
    return base + lambda_ * total
