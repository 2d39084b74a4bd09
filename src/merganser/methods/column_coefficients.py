"""Column coefficients: a weight for every column of every task vector, fitted to what each model makes of its inputs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..method import Count, Embeddings, FromData, NonNegative, Others, PerModel, Positive, default, merge_method
from ..ops import deltas, shares

_MOST_MEMORY = 8
"""Largest memory of the products of task vectors, over that of the task vectors."""


def quadratic_form(vectors: list[Tensor], inputs: Tensor, steps: int) -> Callable[[Tensor], Tensor]:
    """Return what multiplies coefficients, shape [T, n], by the matrix A of the quadratic form in them.

        (A c)_a = sum_b ((V_a^T V_b) * inputs) c_b

    The products are formed once where that is less work than to multiply by `inputs` in every step, and they are not
    much larger than the task vectors.

    Args:
        vectors: Task vectors V_i, shape [m, n] each, float64.
        inputs: Shape [n, n], float64, symmetric.
        steps: How often it will be used.
    """
    rows, columns = vectors[0].shape
    pairs = [(a, b) for a in range(len(vectors)) for b in range(a, len(vectors))]
    if len(pairs) >= steps or len(pairs) * columns > _MOST_MEMORY * len(vectors) * rows:

        def multiplied(c: Tensor) -> Tensor:
            outputs = torch.zeros_like(vectors[0])
            for vector, own in zip(vectors, c, strict=True):
                outputs += vector * own
            outputs = outputs @ inputs
            return torch.stack([(vector * outputs).sum(0) for vector in vectors])

        return multiplied
    products = [(vectors[a].T @ vectors[b]).mul_(inputs) for a, b in pairs]

    def combined(c: Tensor) -> Tensor:
        image = torch.zeros_like(c)
        for (a, b), product in zip(pairs, products, strict=True):
            image[a] += product @ c[b]
            if a != b:
                image[b] += product.T @ c[a]
        return image

    return combined


def descend(vectors: list[Tensor], inputs: Tensor, pull: Tensor, ridge: Tensor, steps: int) -> Tensor:
    """Solve (A + ridge diag(A)) c = pull by conjugate gradients from c = 0; every step lowers the objective.

    Args:
        vectors: Task vectors, shape [m, n] each, float64.
        inputs: Weighted sum of the Gram matrices, shape [n, n], float64.
        pull: Right side, shape [T, n], float64.
        ridge: What is added to the diagonal of A, over that diagonal.
        steps: Most steps.

    Returns:
        c, shape [T, n], float64.
    """
    diagonal = torch.stack([vector.square().sum(0) for vector in vectors]) * inputs.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    found = torch.zeros_like(pull)
    residual = torch.where(diagonal > 0, pull, 0.0)
    direction = inverse * residual
    size = first = (residual * direction).sum()
    form = quadratic_form(vectors, inputs, steps)
    for _ in range(steps):
        if not size > 1e-24 * first:
            break
        image = form(direction) + ridge * diagonal * direction
        length = size / (direction * image).sum()
        found = found + length * direction
        residual = residual - length * image
        scaled = inverse * residual
        before, size = size, (residual * scaled).sum()
        direction = scaled + size / before * direction
    return found


@merge_method(
    family="data",
    cite="gauthiercaron2024dam",
    scope="matrix",
    version=2,
    statistics={"gram": FromData("gram")},
)
def column_coefficients(
    base: Tensor,
    models: list[Tensor],
    gram: Sequence[Tensor] | None,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    ridge: Positive = default(0.01),
    steps: Count = default(100),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Add the task vectors with coefficients, one per column and model, that best keep what each model computes.

        merged = base + sum_i delta_i diag(c_i),    delta_i = model_i - base
        c      = argmin sum_i weight_i tr((merged - model_i) gram_i (merged - model_i)^T) + ridge |c - r|_D^2

    gram_i is the mean of x x^T over the tokens of model i, r_i = weight_i / sum_j weight_j in every column, and D the
    diagonal of the quadratic form in c. It is solved by conjugate gradients that start at r, the weighted average.

    Use when:
        You have statistics of each expert's field, and one number per model and matrix (`gram_coefficients`) is too
        coarse, but every column must stay a weighted sum of the task vectors' columns.

    Args:
        weight: How much a model's inputs count.
        ridge: Pulls the coefficients towards r.
        steps: Most steps of conjugate gradients.

    Differs from the paper:
        Only the coefficients are the paper's (DAM), one for every input of a matrix. It learns them by gradient descent
        on the divergence between the outputs of the whole merged model and each model, with all of them in memory, and
        a penalty on coefficients that are alike; here each matrix is fitted by itself, on the models' own inputs.
        The coefficients multiply task vectors, not weights. Embeddings, norms and biases have none.
        Matrices without statistics are averaged.
    """
    vectors = [delta.double() for delta in deltas(base, models)]
    average = shares(weight.double())
    start = torch.zeros_like(vectors[0])
    for share, vector in zip(average, vectors, strict=True):
        start += share * vector
    if gram is None:
        return base + start.to(base.dtype)
    inputs = start.new_zeros(start.shape[1], start.shape[1])
    lacking = torch.zeros_like(start)
    for w, vector, own in zip(weight.double(), vectors, gram, strict=True):
        wide = w * own.double()
        lacking += (vector - start) @ wide
        inputs += wide
    pull = torch.stack([(vector * lacking).sum(0) for vector in vectors])
    change = descend(vectors, inputs, pull, ridge.double(), steps)
    for vector, c in zip(vectors, change, strict=True):
        start += vector * c
    return base + start.to(base.dtype)
