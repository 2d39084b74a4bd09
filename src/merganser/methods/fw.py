"""FW-Merging: steps of Frank-Wolfe from a merge towards the models that lower the loss most."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..method import Count, Fraction, FromData, Learning, NonNegative, PerModel, default, merge_method
from ..ops import deltas, weighted_sum


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how unlikely each token of the text is to the model, shape [tokens]."""
    return -torch.log_softmax(logits, dim=-1).gather(1, labels[:, None])[:, 0]


def first_value(start: Tensor) -> Tensor:
    """Return the first value of every coefficient."""
    return start


def steepest(slope: Tensor) -> Tensor:
    """Return the index of the smallest entry as a one-hot vector; zero if none is negative."""
    chosen = torch.zeros_like(slope)
    index = int(slope.argmin())
    chosen[index] = float(slope[index] < 0)
    return chosen


def choose(slope: Tensor, selection: str) -> Tensor:
    """Return the share of each model in the direction of a step, shape [models].

    Args:
        slope: The slope of each loss on the way to each model, shape [losses, models].
        selection: Whether one model is chosen for all losses, or one for each.
    """
    if selection == "hard":
        return steepest(slope.sum(0))
    chosen = sum((steepest(own) for own in slope), torch.zeros_like(slope[0])).clamp(max=1)
    return chosen / chosen.sum().clamp(min=1)


def towards(values: Tensor, gradients: Tensor, number: int, rate: Tensor, selection: str) -> Tensor:
    """Return the coefficients after a step towards the chosen models.

    Args:
        values: The coefficients, shape [models, 1].
        gradients: The gradient of each loss with respect to them, shape [losses, models, 1].
        number: Number of the step, from 0.
        rate: Length of the first step.
        selection: As in `choose`.
    """
    own = gradients[..., 0].double()
    # to a model is to its task vector, less that of the merge
    direction = choose(own - own @ values.double(), selection).to(values.dtype)[:, None]
    return values + 2 * rate / (number + 2) * (direction - direction.sum() * values)


@merge_method(
    family="data",
    cite="chen2025fw",
    scope="tensor",
    version=2,
    statistics={
        "coefficients": FromData(
            "coefficients",
            inputs="end_to_end",
            learning=Learning(loss=token_loss, start=first_value, over="granularity", update=towards),
        )
    },
    breaks={"identical": "the coefficients of equal models, or of one, need not have the sum 1"},
)
def fw(
    base: Tensor,
    models: list[Tensor],
    coefficients: Sequence[Tensor] | None,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    selection: Literal["hard", "soft"] = "hard",
    granularity: Literal["model", "tensor"] = "tensor",
    start: Fraction = default(0.3),
    steps: Count = default(10),
    rate: Fraction = default(0.1),
    batch: Count = default(100),
) -> Tensor:
    """Go steps of Frank-Wolfe from task arithmetic towards the models that lower the loss of the merge most.

        merged_0   = base + start sum_i (model_i - base)
        slope_ij   = <gradient of weight_i L_i at merged_t, model_j - merged_t>
        hard:        target = model j with the least sum_i slope_ij, if that is negative
        soft:        target = mean of the models that have the least slope_ij for a loss i, if that is negative
        merged_t+1 = merged_t + 2 rate / (t + 2) (target - merged_t)

    L_i is the mean over the tokens of the texts of model i of the negative log-likelihood of the next one. Without a target
    the merge stays.

    Use when:
        You have many candidates, of which some do not help, and texts of the tasks that count: the others get a weight of
        0. Each step costs about four forward passes of the merged model on its texts, and reads all models three times;
        a small `batch` keeps it short. With few models that all help, and the short steps of the default, expect what task
        arithmetic with `start` gives; a `rate` of 1, that of the textbook, moves further. To begin with another merge, give
        it as the base, with `start: 0`.

    Args:
        weight: How much the loss of each task counts.
        selection: Whether one model is chosen for all losses, or one for each.
        granularity: Whether the choice is made for the whole model or for each tensor.
        start: First value of all coefficients; tensors that transformers changes on loading keep it.
        steps: How many.
        rate: Length of the first step: 0 stays, 1 goes all the way.
        batch: Sequences of every model in a step: the next ones, over and over; all, if there are fewer.

    Differs from the paper:
        The slope is the inner product with the way to the model, the linear minimisation of Frank-Wolfe. FusionBench's
        code has the sum over tensors of cosines with the model's weights, which the common base dominates; the authors'
        code for language models has cosines with the task vector of each tensor, and goes to the base where none is
        negative, where this stays.
        The step goes to the model; in the paper it goes 0.3 of the way, or to a merge by another method. The first merge is
        not among the candidates.
        Soft selection shares the step equally among the chosen models, and takes a model that several losses choose once;
        the paper goes on to the next best for the later task, and fits the coefficients by AdaMerging.
        The text's own tokens are the labels; the paper has 100 labelled examples of each task in every step.
    """
    factors = start.expand(len(models)) if coefficients is None else torch.cat([*coefficients])
    return base + weighted_sum(deltas(base, models), factors)
