"""Model Tinting, its shared part: coefficients learnt from each model's confident predictions on its own data."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..method import Count, Fraction, FromData, Learning, NonNegative, PerModel, Positive, default, merge_method
from ..ops import deltas, weighted_sum


def confident_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of each token, shape [tokens]: against what the model says, where it is to be trusted; else 0."""
    scores = torch.log_softmax(logits, dim=-1)
    said, own = torch.log_softmax(teacher, dim=-1).max(-1), scores.detach().max(-1)
    trusted = (said.indices == own.indices) | (said.values >= own.values)
    return torch.where(trusted, -scores.gather(1, said.indices[:, None])[:, 0], 0.0)


def first_value(start: Tensor) -> Tensor:
    """Return the first value of every coefficient."""
    return start


@merge_method(
    family="data",
    cite="jung2024tinting",
    scope="tensor",
    statistics={
        "coefficients": FromData(
            "coefficients", inputs="end_to_end", learning=Learning(loss=confident_loss, start=first_value, over="by")
        )
    },
    breaks={"identical": "the coefficients of equal models, or of one, need not have the sum 1"},
)
def model_tinting(
    base: Tensor,
    models: list[Tensor],
    coefficients: Sequence[Tensor] | None,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    by: Literal["tensor", "layer", "model"] = "tensor",
    start: Fraction = default(0.3),
    steps: Count = default(500),
    rate: Positive = default(0.001),
    batch: Count = default(1),
) -> Tensor:
    """Add the task vectors with coefficients that are learnt from the tokens that each model predicts with confidence.

        merged = base + sum_i clamp(c_i, 0, 1) delta_i,    delta_i = model_i - base
        loss   = sum_i weight_i mean over tokens t of the texts of model i of u_t (- log p(v_t))

    v_t is the token that model i finds most probable at t, p what the merged model predicts there. u_t is 1 where the merged
    model finds the same token most probable, or is no surer of its own than model i is of v_t; and 0 elsewhere.

    Use when:
        As for `adamerging`, but the merge should predict what each model predicts on texts of its own domain, where that
        model is confident: its most probable tokens are the labels.

    Args:
        weight: Factor of the loss on a model's texts.
        by: What has coefficients of its own: every tensor, every layer (all that is outside the layers together), or the
            model.
        start: First value of all coefficients.
        steps: Steps of the optimiser.
        rate: Step size of the optimiser: about how far a coefficient moves in one step.
        batch: Sequences of every model in a step.

    Differs from the paper:
        The paper keeps a layer of its own for each task, the classifier, and trains it with the coefficients, so its result
        needs to be told the task. A language model has one head for all texts, so what is here is the part that gives one
        model: the coefficients, the labels that each model gives, and the choice among them by confidence.
        The loss of all models is lowered in each step; the paper takes a step for each task, in random order.
        The mean is over all tokens, with 0 for those that are left out. Batches are 32 images in the paper.
        Coefficients start at 0.3, are clamped to [0, 1], and learnt by Adam with the step size 0.001, as in the authors' code.
    """
    factors = start.expand(len(models)) if coefficients is None else torch.cat([*coefficients]).clamp(0, 1)
    return base + weighted_sum(deltas(base, models), factors)
