"""Gram coefficients: weights of the task vectors, fitted to what each model makes of its inputs."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..method import Embeddings, Fraction, FromData, NonNegative, Others, PerModel, Positive, default, merge_method
from ..ops import deltas, inverse_norms, shares, shrunk, solve_right, unit_gram


def normal_equations(
    vectors: list[Tensor], gram: Sequence[Tensor], weight: Tensor, alpha: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Return A and b of the equations A c = b that the best coefficients satisfy.

    Args:
        vectors: Task vectors, shape [m, n] each, float64.
        gram: Gram matrix of each model's inputs, shape [n, n].
        weight: How much each model counts, shape [T].
        alpha: Factor of the off-diagonal entries of the Gram matrices.
        normalize: Divide what a model adds by the mean of |delta_i x|^2.

    Returns:
        Shapes [T, T], symmetric, and [T], float64.
    """
    inputs = vectors[0].new_zeros(vectors[0].shape[1], vectors[0].shape[1])
    right = vectors[0].new_zeros(len(vectors))
    for w, vector, own in zip(weight.double(), vectors, gram, strict=True):
        wide = shrunk(own, alpha)
        outputs = vector @ wide
        if normalize:
            size = (outputs * vector).sum()
            w = torch.where(size > 0, w / size, 0.0)
        right += w * torch.stack([(outputs * other).sum() for other in vectors])
        inputs += wide.mul_(w)
    rows = []
    for vector in vectors:
        outputs = vector @ inputs
        rows.append(torch.stack([(outputs * other).sum() for other in vectors]))
    left = torch.stack(rows)
    return (left + left.T) / 2, right


@merge_method(
    family="data",
    cite="jin2023regmean",
    scope="matrix",
    statistics={"gram": FromData("gram")},
)
def gram_coefficients(
    base: Tensor,
    models: list[Tensor],
    gram: Sequence[Tensor] | None,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    alpha: Fraction = default(1.0),
    ridge: Positive = default(1e-3),
    reference: Literal["average", "base"] = "average",
    normalize: bool = False,
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Add the task vectors with the coefficients, one per matrix and model, that best keep what each model computes.

        G_i    = alpha gram_i + (1 - alpha) diag(gram_i),    gram_i = mean of x x^T over the tokens of model i
        M_i    = matrix of tr(delta_a G_i delta_b^T) for all a and b,    delta_i = model_i - base
        A      = sum_i weight_i M_i
        c      = r + (A + ridge diag(A))^-1 (sum_i weight_i M_i[:, i] - A r),    r_i = weight_i / sum_j weight_j
        merged = base + sum_i c_i delta_i

    With ridge at 0 this minimises sum_i weight_i |(merged - model_i) x_i|^2 over the inputs x_i of the models, as RegMean
    does, but only among the sums of the task vectors. Coefficients can be negative, or above 1.

    Use when:
        You have statistics of each expert's field, and the merge must stay a weighted sum of the task vectors. One
        number per model and matrix is fitted; RegMean fits every entry of the matrix.

    Args:
        weight: How much a model's inputs count.
        alpha: Factor of the off-diagonal entries of every Gram matrix.
        ridge: What is added to the diagonal of A, over that diagonal: pulls the coefficients towards r.
        reference: Whether r is the weights over their sum as above, or 0: then what cannot be decided stays as in the
            base.
        normalize: Divide what a model adds to the sum by the mean of |delta_i x_i|^2, so that a model that has changed
            little counts as much as one that has changed a lot.

    Differs from the paper:
        The paper solves for the matrices. The restriction to coefficients is ours: what AdaMerging and others learn by
        gradient descent on the whole model follows here from one linear system per matrix, with a quadratic
        approximation of the loss that treats each matrix by itself.
        Every Gram matrix is a mean over tokens, so that a model counts the same however many tokens it was measured on;
        padding is not among them.
        A model whose matrix received no token (an expert of a mixture that was never chosen) adds nothing to the sum;
        where none received any, c is r. Matrices without statistics (embeddings, the head) are averaged.
    """
    vectors = [delta.double() for delta in deltas(base, models)]
    average = shares(weight.double())
    if gram is None:
        coefficients = average
    else:
        left, right = normal_equations(vectors, gram, weight, alpha, normalize)
        start = average if reference == "average" else torch.zeros_like(average)
        # in units of its diagonal, so that the ridge counts the same for small and large task vectors
        norms, cosines = unit_gram(left)
        unit = inverse_norms(norms)
        pull = ((right - left @ start) * unit).unsqueeze(0)
        coefficients = start + solve_right(pull, cosines.fill_diagonal_(1), ridge)[0] * unit
    total = sum((c * vector for c, vector in zip(coefficients, vectors, strict=True)), torch.zeros_like(vectors[0]))
    return base + total.to(base.dtype)
