"""DAM: weights whose columns have coefficients, learnt so that the merged model predicts what every model does."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ..method import Count, FromData, Learning, NonNegative, PerModel, Positive, default, merge_method


def divergence(logits: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) | softmax(logits / T)) of each token, shape [tokens]."""
    wanted = torch.log_softmax(teacher / temperature, dim=-1)
    found = torch.log_softmax(logits / temperature, dim=-1)
    return temperature.square() * (wanted.exp() * (wanted - found)).sum(-1)


def first_value(count: int) -> float:
    """Return the first value of every coefficient: the average of the models."""
    return 1 / count


def alikeness(coefficients: list[Tensor], similarity: Tensor, overlap: Tensor) -> Tensor:
    """Return the penalty on coefficients of models that are alike, 0-d, summed over the matrices."""
    total = torch.zeros(())
    for own in coefficients:
        pairs = list(combinations(own, 2))
        # a single number per model has no direction
        if own.shape[1] < 2 or not pairs:
            continue
        cosines = torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in pairs])
        shared = torch.stack([torch.minimum(a.abs(), b.abs()).sum() for a, b in pairs])
        total = total + similarity * cosines.mean() + overlap * shared.mean()
    return total


@merge_method(
    family="data",
    cite="gauthiercaron2024dam",
    scope="tensor",
    statistics={
        "coefficients": FromData(
            "coefficients",
            inputs="end_to_end",
            learning=Learning(loss=divergence, start=first_value, over="column", penalty=alikeness),
        )
    },
    breaks={"identical": "the coefficients of equal models, or of one, need not have the sum 1"},
)
def dam(
    models: list[Tensor],
    coefficients: Sequence[Tensor] | None,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    temperature: Positive = default(2.0),
    similarity: NonNegative = default(0.01),
    overlap: NonNegative = default(0.0),
    steps: Count = default(500),
    rate: Positive = default(0.001),
    batch: Count = default(1),
) -> Tensor:
    """Add the models' weights with coefficients for every column, learnt so that the merge predicts what each model does.

        merged = sum_i model_i diag(c_i)
        loss   = sum_i weight_i T^2 KL(softmax(z_i / T) | softmax(z / T)) + penalty
        penalty = sum over matrices of the mean over pairs a, b of
                  similarity cos(c_a, c_b) + overlap sum_j min(|c_aj|, |c_bj|)

    z_i are the logits of model i on its own texts, z those of the merged model on them; the divergence is the mean over the
    tokens. T is the temperature. A matrix has a coefficient for each of its inputs and each model, a table of tokens one for
    each entry of a row, every other tensor one for each model. All start at 1 / number of models, the average.

    Use when:
        You have texts of each model's domain, and time to train through the whole merged model. `column_coefficients`
        fits coefficients of the same kind without training, matrix by matrix.

    Args:
        weight: Factor of the divergence on a model's texts.
        temperature: Softens both predictions; above 1, unlikely tokens count more.
        similarity: Penalty on coefficients of two models that have the same direction.
        overlap: Penalty on columns that two models share.
        steps: Steps of the optimiser.
        rate: Step size of the optimiser: about how far a coefficient moves in one step. Columns of one matrix move by as
            much in different directions, so far larger steps than the default harm the model.
        batch: Sequences of every model in a step.

    Differs from the paper:
        The authors' code keeps the 50 largest logits of each model; here the divergence is over the whole vocabulary.
        They merge linear layers, and embeddings and norms if asked; here all tensors are merged. Norms and biases have one
        coefficient per model, which starts at 1 / number of models.
        They use AdamW that changes the 30 % of the entries with the largest momentum in each step (MoFO) and goes once over
        its data; here it is Adam over all coefficients. Their penalties on the size of coefficients (L1, L2: 1e-6) are left
        out; `overlap` is 1e-5 where they use it. Nothing holds coefficients at the sum 1, as in their code.
        The models run on their data once, block by block; the merged model is run and differentiated block by block in each
        step, with weights made anew, in float32.
    """
    merged = models[0] * (1 / len(models) if coefficients is None else coefficients[0])
    for i in range(1, len(models)):
        merged = merged + models[i] * (1 / len(models) if coefficients is None else coefficients[i])
    return merged
