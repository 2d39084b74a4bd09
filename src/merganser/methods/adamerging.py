"""AdaMerging: task vectors with coefficients that are learnt from the entropy of what the merged model predicts."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..method import Count, Fraction, FromData, Learning, NonNegative, PerModel, Positive, default, merge_method
from ..ops import deltas, weighted_sum


def token_loss(logits: Tensor, labels: Tensor, objective: str) -> Tensor:
    """Return the loss of each token, shape [tokens]: how uncertain the model is, or how unlikely the text is to it."""
    scores = torch.log_softmax(logits, dim=-1)
    if objective == "likelihood":
        return -scores.gather(1, labels[:, None])[:, 0]
    return -(scores.exp() * scores).sum(-1)


def first_value(start: Tensor) -> Tensor:
    """Return the first value of every coefficient."""
    return start


@merge_method(
    family="data",
    cite="yang2024adamerging",
    scope="tensor",
    statistics={
        "coefficients": FromData(
            "coefficients", inputs="end_to_end", learning=Learning(loss=token_loss, start=first_value, over="by")
        )
    },
    breaks={"identical": "the coefficients of equal models, or of one, need not have the sum 1"},
)
def adamerging(
    base: Tensor,
    models: list[Tensor],
    coefficients: Sequence[Tensor] | None,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    by: Literal["tensor", "layer", "model"] = "tensor",
    objective: Literal["entropy", "likelihood"] = "entropy",
    start: Fraction = default(0.3),
    steps: Count = default(500),
    rate: Positive = default(0.001),
    batch: Count = default(1),
) -> Tensor:
    """Add the task vectors with coefficients that are learnt through the whole merged model, on texts of all domains.

        merged = base + sum_i clamp(c_i, 0, 1) delta_i,    delta_i = model_i - base
        loss   = sum_i weight_i mean over tokens t of the texts of model i of H(p(. | x_<t)),    H(p) = - sum_v p_v log p_v

    p is what the merged model predicts for the next token. Every tensor has one c_i per model (layer-wise AdaMerging), or
    every layer has, or the model (task-wise). All start at `start`, and Adam lowers the loss, with some sequences of every
    model's texts in each step.

    Use when:
        You have unlabelled texts of every domain, and time to train: each step costs about four forward passes of the
        merged model on its texts, and reads all models three times. `expert_merging` learns the same numbers block by block, for a fraction of that time. On general
        text `objective: likelihood` is safer than the entropy.

    Args:
        weight: Factor of the loss on a model's texts.
        by: What has coefficients of its own: every tensor, every layer (all that is outside the layers together), or the
            model.
        objective: What is lowered: the entropy of the predictions, or the negative log-likelihood of the texts themselves.
        start: First value of all coefficients.
        steps: Steps of the optimiser.
        rate: Step size of the optimiser: about how far a coefficient moves in one step.
        batch: Sequences of every model in a step.

    Differs from the paper:
        The paper classifies images, and takes the entropy over the classes of each task. For language models the classes
        are the tokens of the vocabulary, and the loss is taken at every token that is followed by one that counts. A batch
        of 16 images has 16 predictions; one sequence of 256 tokens has 255, so 1 is the default here.
        Entropy is a weaker guide for a language model than for a classifier: good predictions of open text are uncertain,
        and a degenerate model is certain of itself. So there is `objective: likelihood`, which needs no labels either, as a
        text is its own. (Published code for Llama takes it, too.)
        As in the authors' code, coefficients are clamped to [0, 1], Adam has the step size 0.001, and there are 500 steps.
        A coefficient moves by about 0.001 in a step; with few steps a larger `rate`, such as 0.02, gets somewhere.
        "Layer-wise" is by tensor in that code, as with `by: tensor` here. AdaMerging++, which first takes from the task
        vectors what TIES does, is not offered.
        Gradients are exact, in float32, block by block, with weights made anew in each step; nothing whole is in memory.
        Tensors that transformers changes on loading keep `start` with `by: tensor`.
    """
    factors = start.expand(len(models)) if coefficients is None else torch.cat([*coefficients]).clamp(0, 1)
    return base + weighted_sum(deltas(base, models), factors)
