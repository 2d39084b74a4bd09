"""MAGIC: the sum of the task vectors, with each row brought back to the length that its task vectors have."""

import torch
from torch import Tensor

from ..method import Embeddings, Others, PerModel, Scale, Weight, default, merge_method
from ..ops import deltas, weighted_sum


def inner_products(first: Tensor, second: Tensor) -> Tensor:
    """Return the inner products of the rows of two matrices, shape [rows, 1], float64."""
    return (first.double() * second.double()).sum(dim=1, keepdim=True)


def gains(merged: Tensor, vectors: list[Tensor]) -> Tensor:
    """Return the factors that put the rows of a merged task vector on the ellipsoids of its task vectors' rows.

    Args:
        merged: The merged task vector, shape [rows, columns].
        vectors: The task vectors, of the same shape.

    Returns:
        Shape [rows, 1], float64; 1 for rows of zeros.
    """
    rest = merged
    inside = lengths = torch.zeros(len(merged), 1, dtype=torch.float64, device=merged.device)
    for vector in vectors:
        squares = inner_products(vector, vector)
        coefficient = inner_products(merged, vector) / torch.where(squares > 0, squares, 1.0)
        inside = inside + coefficient.square()
        lengths = lengths + squares.sqrt()
        rest = rest - coefficient.to(merged.dtype) * vector
    radius = torch.where(lengths > 0, lengths / len(vectors), 1.0)
    size = inside + inner_products(rest, rest) / radius.square()
    return torch.where(size > 0, size, 1.0).rsqrt()


@merge_method(
    family="task vectors",
    cite="li2025magic",
    scope="matrix",
    breaks={"identical": "task vectors count as orthogonal, so that equal ones come out shorter than they are"},
)
def magic(
    base: Tensor,
    models: list[Tensor],
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Add the task vectors, and calibrate the length of every row of the sum by the rows of the task vectors.

        d      = a row of sum_i weight_i * delta_i, a_i = that row of delta_i, delta_i = model_i - base
        c_i    = <d, a_i> / |a_i|^2
        rest   = d - sum_i c_i a_i
        gain   = 1 / sqrt(sum_i c_i^2 + |rest|^2 / (mean_i |a_i|)^2)
        merged = base + lambda * gain * d

    Use when:
        Task arithmetic would be used, and there is no data to choose its factor: the length of the result follows from
        the task vectors. T nearly orthogonal task vectors (different tasks) give 1 / sqrt(T) of their sum.

    Args:
        weight: Factor of each task vector in the sum; in matrices only the ratios count.
        lambda_: Factor of the merged task vector, after it was calibrated.

    Differs from the paper:
        The paper calibrates what any method merged; this is the calibration in weight space, for task arithmetic. Its
        calibration by features needs data, and is not offered. Nor are its list of sensitive layers, whose rows it only
        shrinks while those of others only grow, found by evaluating the model, and the variant by spectral norms.
        The formula is that of the authors' program, which calibrates convolutions and embeddings, too; `embeddings:
        matrix` does the latter. As there, the a_i count as orthogonal in the formula, though they need not be.
        The program adds 1e-8 to every squared norm it divides by, whatever the scale; here only zeros are left out.
        So a model whose row changed a hundred times less than those of the others may shorten the merged row.
    """
    vectors = deltas(base, models)
    merged = weighted_sum(vectors, weight)
    return base + lambda_ * gains(merged, vectors).to(merged.dtype) * merged
