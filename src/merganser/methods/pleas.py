"""PLeaS: matrices that turn the mean of what aligned models receive into the mean of what they return."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method import Embeddings, FromData, Others, Positive, default, merge_method
from ..ops import solve_right


@merge_method(
    family="data",
    cite="nasery2025pleas",
    scope="matrix",
    statistics={"cross_gram": FromData("cross_gram", inputs="mean")},
)
def pleas(
    base: Tensor | None,
    models: list[Tensor],
    cross_gram: Sequence[Tensor] | None,
    *,
    ridge: Positive = default(1e-4),
    limit: Positive = default(2.0),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Fit every matrix by least squares to the mean outputs of all models, where it receives the mean of their inputs.

        x      = mean_i x_i,    y = mean_i model_i x_i    for one token, x_i being what the matrix receives in model i
        A      = mean_i model_i
        merged = A + (mean over tokens of (y - A x) x^T) (mean over tokens of x x^T + e I)^-1

    So the merged matrix is the one with the least mean |merged x - y|^2. All models read the same tokens.

    Use when:
        Models that were trained from different initialisations are merged. It needs `align`, which permutes their units
        first, and a few thousand tokens of text without labels. For fine-tunes of one base use RegMean, which fits each
        expert on its own text.

    Args:
        ridge: What is added to the diagonal of the mean of x x^T, over the mean of that diagonal: pulls towards A. It is
            raised where that mean is not positive definite.
        limit: Largest length of merged - A, over the largest length of a model_i - A. Where it would be longer, the ridge
            is raised tenfold until it is not.

    Differs from the paper:
        The paper is about two networks for images; here any number of models, and blocks of a transformer. It takes 400
        steps of Adam; this is the minimum itself, but for ridge and limit, which are ours.
        The permutation is not part of this method but of the recipe's `align`. All units are merged, so that the model
        keeps its width; the paper can also keep a share of the units of every layer apart, which makes layers wider.
        Biases, norms, embeddings and head are averaged; the paper fits biases, and resets the statistics of norms.
        Experts of a mixture are averaged: the models may choose different experts for a token.
    """
    wide = [model.double() for model in models]
    average = torch.stack(wide).mean(0)
    if cross_gram is None:
        return average.to(models[0].dtype)
    total = torch.zeros(average.shape[1], average.shape[1], dtype=torch.float64, device=average.device)
    pull = torch.zeros_like(average)
    for model, cross in zip(wide, cross_gram, strict=True):
        moment = cross.double()
        total += moment / len(wide)
        pull += (model - average) @ moment.T / len(wide)
    longest = limit * torch.stack([(model - average).norm() for model in wide]).max()
    step = solve_right(pull, (total + total.T) / 2, ridge, longest=longest)
    return (average + step).to(models[0].dtype)
