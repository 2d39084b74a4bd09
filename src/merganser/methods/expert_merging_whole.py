"""Expert Merging as published: task vectors with coefficients learnt from what each model predicts, through the whole merge."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..method import Count, FromData, Learning, NonNegative, PerModel, Positive, default, merge_method
from ..ops import deltas
from .dam import divergence
from .expert_merging import Sigmoid, add_chunks


def first_value(start: Tensor) -> float:
    """Return the first value of every c: that whose sigmoid is `start`."""
    return math.log(float(start) / (1 - float(start)))


def pull(coefficients: list[Tensor], start: Tensor, regulariser: Tensor) -> Tensor:
    """Return the penalty on coefficients that are far from `start`, 0-d."""
    # against the start as the sigmoid gives it, so that there is no pull at the start
    first = torch.tensor(first_value(start)).sigmoid()
    pulls = [(own.sigmoid() - first).abs().mean(1).sum() for own in coefficients]
    return regulariser * torch.stack(pulls).mean()


@merge_method(
    family="data",
    cite="zhang2025expert",
    scope="tensor",
    statistics={
        "coefficients": FromData(
            "coefficients",
            inputs="end_to_end",
            learning=Learning(loss=divergence, start=first_value, over="chunk", penalty=pull),
        )
    },
    breaks={"identical": "the coefficients of equal models, or of one, need not have the sum 1"},
)
def expert_merging_whole(
    base: Tensor,
    models: list[Tensor],
    coefficients: Sequence[Tensor] | None,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    start: Sigmoid = default(0.1),
    chunks: Count = default(1),
    temperature: Positive = default(1.0),
    regulariser: NonNegative = default(0.1),
    steps: Count = default(5),
    rate: Positive = default(0.5),
    batch: Count = default(1),
) -> Tensor:
    """Add the task vectors with coefficients that are learnt so that the merged model predicts what each model predicts.

        merged = base + sum_i s(c_i) delta_i,    delta_i = model_i - base,    s(c) = 1 / (1 + exp(-c))
        loss   = sum_i weight_i T^2 KL(softmax(z_i / T) | softmax(z / T)) + regulariser mean over tensors of sum_i |s(c_i) - start|

    z_i are the logits of model i on its own texts, z those of the merged model on them; the divergence is the mean over the
    tokens, T the temperature. Every tensor has one c per model, or one for each of its chunks. Adam lowers the loss, with
    some sequences of every model in each step.

    Use when:
        You have a handful of texts of each expert's field. Five steps, each with one text of every model, are what the paper
        takes. `expert_merging` learns the same numbers block by block, from hidden states.

    Args:
        weight: Factor of the divergence on a model's texts.
        start: First value of every s(c), to which the regulariser pulls.
        chunks: Into how many pieces of consecutive elements a tensor is cut, each with its own coefficient for each
            model. Where the pieces cannot be equal, the first ones have one element more.
        temperature: Softens both predictions; above 1, unlikely tokens count more.
        regulariser: Pulls towards start.
        steps: Steps of the optimiser.
        rate: Step size of the optimiser, for c.
        batch: Sequences of every model in a step.

    Differs from the paper:
        The authors' code accumulates the gradients of eight texts and goes once over five texts of each model; here a step has
        `batch` texts of each. Its optimiser is AdamW with warm restarts of the rate and clipped gradients; here it is Adam with
        one rate. The divergence stands for its cross-entropy, which has the same gradients. Hidden states, an option of that
        code that is off by default, are not compared.
        The paper's regulariser is 5, that of its code 0.1. The chunked variant (Expert Merging++) chooses the number of chunks
        of a layer by its importance; here it is a parameter. That code drops coefficients where a tensor cannot be cut into
        equal chunks; here none is.
        A coefficient is between 0 and 1, so one model, or equal ones, do not come out exactly.
        The models run on their data once, block by block; the merged model is run and differentiated block by block in each
        step, with weights made anew, in float32. Statistics hold c, not s(c).
    """
    vectors = deltas(base, models)
    firsts = [start[None]] * len(vectors)
    return add_chunks(base, vectors, firsts if coefficients is None else [own.sigmoid() for own in coefficients])
