"""Metrics-weighted averaging: average of checkpoints, weighted by their loss or their training step."""

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
    """Average checkpoints; those with a lower loss, or from a later step, count more.

        amount_i = (1 / metric_i)^penalty          (metric_i^penalty by step)
        merged   = sum_i amount_i * model_i / sum_i amount_i

    Use when:
        The models are checkpoints of one run, and their losses were logged.

    Args:
        metric: Loss of each checkpoint, or its training step.
        by: Whether the metric is a loss or a step.
        penalty: How much the metric counts: 0 gives equal shares; the larger it is, the more the best checkpoint
            dominates.

    Differs from the paper:
        Not checked: the paper has one penalty factor for all checkpoints; that it is an exponent is our reading, and
        its default is ours.
        The paper averages LoRA factors; this averages any tensors.
    """
    rank = metric.log() if by == "step" else -metric.log()
    return weighted_sum(models, shares(torch.exp(penalty * (rank - rank.max()))))
