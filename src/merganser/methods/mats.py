"""MaTS: matching models in their task subspaces, by Kronecker-factored Fisher information and conjugate gradients."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..method import Count, Embeddings, Fraction, FromData, NonNegative, Others, PerModel, default, merge_method
from ..ops import deltas, shares, shrunk, weighted_sum

_DONE = 1e-10
"""Share of the first residual's square at which the equations count as solved."""


def descend(apply: Callable[[Tensor], Tensor], start: Tensor, residual: Tensor, iterations: int) -> Tensor:
    """Return a solution of `apply(x) = b` after some steps of conjugate gradients.

    Args:
        apply: A positive semidefinite linear map on matrices.
        start: The matrix to start from.
        residual: b - apply(start).
        iterations: Most steps.
    """
    solution, direction = start, residual
    first = square = (residual * residual).sum()
    for _ in range(iterations):
        if not square > _DONE * first:
            break
        image = apply(direction)
        curvature = (direction * image).sum()
        if not curvature > 0:
            break
        step = square / curvature
        solution = solution + step * direction
        residual = residual - step * image
        before, square = square, (residual * residual).sum()
        direction = residual + square / before * direction
    return solution


@merge_method(
    family="data",
    cite="tam2024mats",
    scope="matrix",
    statistics={"gram": FromData("gram"), "gradient_gram": FromData("gradient_gram")},
)
def mats(
    base: Tensor,
    models: list[Tensor],
    gram: Sequence[Tensor] | None,
    gradient_gram: Sequence[Tensor] | None,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    alpha: Fraction = default(1.0),
    iterations: Count = 10,
    reference: Literal["average", "base"] = "average",
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Find the matrix whose outputs agree with all models' in the directions that matter to their losses.

        G_i    = alpha gram_i + (1 - alpha) diag(gram_i),    H_i = alpha gradient_gram_i + (1 - alpha) diag(gradient_gram_i)
        solve    sum_i weight_i H_i (merged - model_i) G_i = 0    by conjugate gradients from the reference

    gram_i is the mean of x x^T over the inputs x of a matrix, gradient_gram_i that of g g^T over the gradients g of its
    outputs: their Kronecker product approximates the Fisher information of the matrix (K-FAC). The equations minimise
    sum_i weight_i tr(H_i (merged - model_i) G_i (merged - model_i)^T).

    Use when:
        You have text of each expert's field. RegMean treats all outputs of a matrix as equally important; MaTS measures
        which of them the loss depends on.

    Args:
        weight: How much a model counts.
        alpha: Factor of the off-diagonal entries of all Gram matrices.
        iterations: Most steps. Directions in which the sum of the Fisher information is small stay near the reference;
            more steps change them, too, which can be worse.
        reference: The start: the weighted average of the models, or the base.

    Differs from the paper:
        The paper takes 100 steps at most, starting from task arithmetic, TIES or the average; here 10, from the average
        or the base. A step costs as much as four products of all Gram matrices with the matrix, and the first steps
        change most.
        Gram matrices are means over tokens, of inputs over all tokens, of gradients over those in the loss; padding is
        not among them. The paper divides by the number of tokens likewise.
        Arithmetic is float64. A matrix without both statistics (experts of a mixture, routers, embeddings, the head) is
        averaged, as are vectors; the paper averages these, too.
    """
    vectors = [delta.double() for delta in deltas(base, models)]
    mean = weighted_sum(vectors, shares(weight.double()))
    if gram is None or gradient_gram is None:
        return base + mean.to(base.dtype)
    factors = [
        (w * shrunk(outputs, alpha), shrunk(inputs, alpha))
        for w, inputs, outputs in zip(weight.double(), gram, gradient_gram, strict=True)
    ]

    def apply(matrix: Tensor) -> Tensor:
        return sum((left @ matrix @ right for left, right in factors), torch.zeros_like(matrix))

    start = mean if reference == "average" else torch.zeros_like(mean)
    pairs = zip(factors, vectors, strict=True)
    residual = sum((left @ (vector - start) @ right for (left, right), vector in pairs), torch.zeros_like(mean))
    return base + descend(apply, start, residual, iterations).to(base.dtype)
