"""FW-Merging: one step of Frank-Wolfe from a merge towards the model that lowers the loss most."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..method import Fraction, FromData, NonNegative, PerModel, default, merge_method, statistic
from ..ops import deltas


def slopes(base: Tensor, models: list[Tensor], gradient: Sequence[Tensor] | None) -> Tensor:
    """Measure `<gradient_i, model_j - base>` for every task i and model j, shape [T, T], float64."""
    if gradient is None:
        return torch.zeros(len(models), len(models), dtype=torch.float64)
    vectors = [delta.double() for delta in deltas(base, models)]
    return torch.stack([torch.stack([(own.double() * vector).sum() for vector in vectors]) for own in gradient])


def steepest(slope: Tensor) -> Tensor:
    """Return the index of the smallest entry as a one-hot vector; zero if none is negative."""
    chosen = torch.zeros_like(slope)
    index = int(slope.argmin())
    chosen[index] = float(slope[index] < 0)
    return chosen


def choose(measured: Tensor, weight: Tensor, selection: str) -> Tensor:
    """Return the share of each model in the direction of the step, shape [T]."""
    if selection == "hard":
        return steepest((weight[:, None] * measured).sum(0))
    wanted = [steepest(slope) for task, slope in enumerate(measured) if weight[task] > 0]
    chosen = sum(wanted, torch.zeros_like(weight)).clamp(max=1)
    return chosen / chosen.sum().clamp(min=1)


@merge_method(
    family="data",
    cite="chen2025fw",
    statistics={
        "gradient": FromData("gradient", of="base_on_models"),
        "direction": statistic(slopes, choose, over="granularity"),
    },
    breaks={
        "identical": "it goes only part of the way",
    },
)
def fw(
    base: Tensor,
    models: list[Tensor],
    direction: Tensor,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    step: Fraction = default(0.1),
    selection: Literal["hard", "soft"] = "hard",
    granularity: Literal["model", "tensor"] = "model",
) -> Tensor:
    """Go one step of Frank-Wolfe from the base, which is a merge, towards the models that lower the loss most.

        slope_ij = <gradient_i, model_j - base>
        hard:    direction = model j with the least sum_i weight_i slope_ij, if that is negative
        soft:    direction = mean of the models that have the least slope_ij for a task i, if that is negative
        merged   = base + step (direction - base)

    gradient_i is the gradient of the loss of the base on the text of task i.

    Use when:
        You have a merge, and many candidates of which some do not help: give the merge as the base, and measure its
        gradient on text of every task. Repeat it with the result as the base for further steps.

    Args:
        weight: How much the loss of each task counts.
        step: Length of the step: 0 stays, 1 goes all the way. The authors' has 0.1 * 2 / (t + 2) in iteration t.
        selection: Whether one model is chosen for all tasks, or one for each.
        granularity: Whether the choice is made for the whole model or for each tensor.

    Differs from the paper:
        The paper iterates, 10 times; here a run is one step, since a gradient at the new point takes two more readings of
        the model.
        The slope is the inner product with the way to the model, the linear minimisation of Frank-Wolfe. FusionBench's
        code has the sum over tensors of cosines with the model's weights, which the common base dominates; the authors'
        code for language models has cosines with the task vector of each tensor, and 0 in place of a tensor where none is
        negative, where this stays.
        The step goes to the model; the paper goes to base + 0.3 (model - base), or to a merge by another method.
        Soft selection shares the step equally among the chosen models, and takes a model that several tasks choose once;
        the paper goes on to the next best for the later task, and fits the coefficients by AdaMerging.
        The text's own tokens are the labels.
    """
    total = torch.zeros_like(base)
    for i, delta in enumerate(deltas(base, models)):
        total = total + delta * direction[i]
    return base + step * total
