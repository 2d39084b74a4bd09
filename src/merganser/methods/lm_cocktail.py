"""LM-Cocktail: average by weights, or by how well models do on a few examples."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from ..method import Fraction, Number, PerModel, Positive, Weight, default, merge_method
from ..ops import shares, weighted_sum

Amount = Annotated[Tensor, Number(0.0, search=(0.0, 1.0))]


def check_weights(parameters: Mapping[str, Any]) -> str | None:
    """Complain where no model has a weight."""
    return None if any(parameters["weight"]) else "weight is 0 for every model; one at least must be above 0"


@merge_method(
    family="averages",
    cite="xiao2023cocktail",
    breaks={"order": "alpha belongs to the first model"},
    validate=check_weights,
)
def lm_cocktail(
    models: list[Tensor],
    *,
    weight: PerModel[Amount] = default(1.0),
    loss: PerModel[Weight] = default(0.0),
    temperature: Positive = default(5.0),
    alpha: Fraction = default(0.0),
) -> Tensor:
    """Mix models by given weights, or by their losses on a few examples, and with a fine-tuned model.

        share_i = weight_i * exp(-loss_i / temperature), divided by the sum of these
        merged  = alpha * model_1 + (1 - alpha) * sum_i share_i * model_i

    Use when:
        A model was fine-tuned for one task and forgot others: mix it with its base, and with fine-tunes on other
        tasks. Or a new task has a handful of examples and no model of its own.

    Args:
        weight: Share of each model, before the losses are looked at.
        loss: Loss of each model on examples of the task; equal ones leave the weights alone.
        temperature: The larger, the less the losses count.
        alpha: What is set aside for the first model, the one fine-tuned for the task. The paper sets aside 0.5, and
            mixes the others alone: give the first model a weight of 0.

    Differs from the paper:
        Weights are divided by their sum; the authors' code expects them to add up to 1.
        The losses are given; the authors' code measures them.
    """
    # the least loss that counts: of a weight of 0 nothing is left
    least = torch.where(weight > 0, loss, torch.inf).min()
    share = shares(weight * torch.exp((least - loss).clamp(max=0) / temperature))
    first = torch.arange(len(models), device=share.device) == 0
    return weighted_sum(models, (1 - alpha) * share + torch.where(first, alpha, 0.0))
