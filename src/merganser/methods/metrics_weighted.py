"""Metrics-weighted averaging: average of checkpoints by their loss or their step."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from ..method import Number, PerModel, default, merge_method
from ..ops import shares, weighted_sum

Metric = Annotated[Tensor, Number(0.0, open=True, search=(0.5, 3.0))]
Penalty = Annotated[Tensor, Number(0.0, search=(0.0, 8.0))]


@merge_method(family="averages", cite="yu2025mwa")
def metrics_weighted(
    models: list[Tensor],
    *,
    metric: PerModel[Metric],
    by: Literal["loss", "step"] = "loss",
    penalty: Penalty = default(1.0),
) -> Tensor:
    """Average checkpoints, those with a lower loss or of a later step counting more.

        amount_i = (1 / metric_i)^penalty          (metric_i^penalty by step)
        merged   = sum_i amount_i * model_i / sum_i amount_i

    Use when:
        The models are checkpoints of one run, and their losses are in the log.

    Args:
        metric: Loss of each checkpoint, or the training step that it was taken at.
        by: What the metric is.
        penalty: How much the metric counts: 0 for equal shares; the larger, the more the best checkpoint alone.

    Differs from the paper:
        Not checked: the paper has one penalty factor for all checkpoints; the power that it is here is our reading, and
        so is its default.
        The paper averages LoRA factors; this averages whatever tensors there are.
    """
    rank = metric.log() if by == "step" else -metric.log()
    return weighted_sum(models, shares(torch.exp(penalty * (rank - rank.max()))))
