"""LM-Cocktail: average by given weights, or by the losses of models on a few examples."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from ..method import Fraction, Number, NumbersFromData, PerModel, Positive, Weight, default, merge_method
from ..ops import shares, weighted_sum

Amount = Annotated[Tensor, Number(0.0, search=(0.0, 1.0))]


def check_weights(parameters: Mapping[str, Any]) -> str | None:
    """Return a complaint if the weight of every model is 0, else None."""
    return None if any(parameters["weight"]) else "weight is 0 for every model; one at least must be above 0"


def mean_losses(measured: Sequence[float] | None, loss: Sequence[float]) -> tuple[float, ...]:
    """Return the loss of each model: as given, plus what was measured on data."""
    return tuple(loss if measured is None else map(sum, zip(loss, measured, strict=True)))


@merge_method(
    family="averages",
    cite="xiao2023cocktail",
    statistics={"measured": NumbersFromData("loss", optional=True)},
    located={"mean_loss": mean_losses},
    breaks={"order": "alpha belongs to the first model"},
    validate=check_weights,
)
def lm_cocktail(
    models: list[Tensor],
    mean_loss: Tensor,
    *,
    weight: PerModel[Amount] = default(1.0),
    loss: PerModel[Weight] = default(0.0),
    temperature: Positive = default(5.0),
    alpha: Fraction = default(0.0),
) -> Tensor:
    """Average models by given weights or by their losses on a few examples, and mix the result with the first model.

        share_i = weight_i * exp(-loss_i / temperature), divided by the sum of these
        merged  = alpha * model_1 + (1 - alpha) * sum_i share_i * model_i

    Use when:
        A model was fine-tuned for one task and forgot others: mix it with its base, and with fine-tunes on other
        tasks. Or a new task has only a few examples, and no model was trained for it.

    Args:
        weight: Share of each model, before the losses are taken into account.
        loss: Loss of each model on examples of the task; equal losses do not change the weights. Where the recipe names
            statistics of the models, made with the same data and `--statistics loss`, the mean loss that was measured is
            added to it.
        temperature: The larger it is, the less the losses count.
        alpha: Share that is reserved for the first model, the one fine-tuned for the task. The paper reserves 0.5 and
            averages only the other models: to do that, give the first model a weight of 0.

    Differs from the paper:
        Weights are divided by their sum; the authors' code expects them to add up to 1.
        Losses are parameters, or measured by `merganser calibrate`, over all tokens or those of completions alone.
        At the authors' temperature of 5, losses that differ by less than 1 hardly change the weights.
    """
    # the smallest loss among models with a weight above 0, so that the largest exponential is 1
    least = torch.where(weight > 0, mean_loss, torch.inf).min()
    share = shares(weight * torch.exp((least - mean_loss).clamp(max=0) / temperature))
    first = torch.arange(len(models), device=share.device) == 0
    return weighted_sum(models, (1 - alpha) * share + torch.where(first, alpha, 0.0))
