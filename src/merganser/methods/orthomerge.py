"""OrthoMerge: average the rotations that lead from the base to each model, and add a share of what is not a rotation."""

import torch
from torch import Tensor

from ..method import Embeddings, Others, Scale, default, merge_method
from ..ops.linalg.rounding import deltas_above_rounding
from ..ops.linalg.spectral import polar

_STRAIGHT = 1e-10
"""Bounds tangents of half angles by 1e5: a reflected direction, whose tangent is infinite, counts as not rotated."""

_OPPOSED = 1e-8
"""Norm below which a sum of rotations is rounding, and fades to 0 instead of getting the mean norm."""

_APART = 1e-6
"""Cosine up to which directions of two null spaces have nothing in common."""


def rotation(source: Tensor, target: Tensor) -> Tensor:
    """Return the orthogonal R that minimises |source R - target|, shape [n, n], float64.

    Directions that neither of them has are turned as little as possible.

    Args:
        source: Shape [m, n], float64.
        target: Shape [m, n], float64.
    """
    factor, rank = polar(source.T @ target)
    n = len(factor)
    if rank == n:
        return factor
    eye = torch.eye(n, dtype=factor.dtype, device=factor.device)
    free = (eye - factor @ factor.T) @ (eye - factor.T @ factor)
    return factor + polar(free, tolerance=_APART).factor


def generator(turn: Tensor) -> Tensor:
    """Return the Cayley transform (R + I)^-1 (R - I) of an orthogonal matrix, skew-symmetric, shape [n, n].

    It is (R - R^T) (2 I + R + R^T)^-1, whose inverse exists with a small shift, even where R turns by 180 degrees.
    """
    shifted = turn + turn.T
    shifted.diagonal().add_(2 + _STRAIGHT)
    turned: Tensor = torch.linalg.solve(shifted, turn - turn.T)
    return (turned - turned.T) / 2


def moved(source: Tensor, skew: Tensor) -> Tensor:
    """Return source (R - I) for the rotation R = (I - A)^-1 (I + A) of a skew-symmetric A; exactly 0 where A is.

    Args:
        source: Shape [m, n].
        skew: A, shape [n, n].
    """
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    half: Tensor = torch.linalg.solve(eye - skew, skew)
    return 2 * source @ half


def mean_generator(skews: list[Tensor]) -> Tensor:
    """Return the sum of skew-symmetric matrices at the mean of their norms; 0 where they cancel."""
    total = torch.stack(skews).sum(0)
    norm: Tensor = total.norm()
    mean = torch.stack([skew.norm() for skew in skews]).mean()
    return total * (mean / norm.clamp(min=_OPPOSED))


@merge_method(
    family="spectral",
    cite="yang2026orthomerge",
    scope="matrix",
    version=2,
    breaks={"identical": "only a share of what is not a rotation is added"},
)
def orthomerge(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    residual: Scale = default(0.2),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Average the rotations that lead from the base to each model, and add a share of what is left of them.

        R_i    = argmin |base R - model_i| over orthogonal R, of base^T model_i = U S V^T: R_i = U V^T
        A_i    = (R_i + I)^-1 (R_i - I)
        A      = mean_i |A_i| * sum_i A_i / |sum_i A_i|,   R = (I - A)^-1 (I + A)
        merged = base R + residual * sum_i (model_i - base R_i)

    Use when:
        Fine-tunes should keep the geometry of the base, the angles between the rows of its matrices, or were trained by
        orthogonal fine-tuning. It decomposes a square matrix of the size of the inputs for each model in float64, twice
        where a matrix has fewer rows than columns, which is slow for wide layers.

    Args:
        residual: Factor of the sum of what no rotation explains; 0.2 in the authors' code.

    Differs from the paper:
        Directions of a task vector that contain only rounding errors of the stored weights are left out.
        The formula was compared with the authors' code for task arithmetic of the residuals, not with the paper. Their
        variants that merge the residuals by TIES and TSV-M, and that for adapters of orthogonal fine-tuning, are not
        here.
        Where a matrix has fewer rows than columns, R_i is not unique; published code takes what its decomposition
        happens to give, here the free directions are turned as little as possible.
        A direction that a model reflects counts as not rotated, and so goes to what is left; there the transform has
        no value.
        The authors rotate embeddings and the head too, and add 0.2 times the sum of the changes of norms and biases.
        Here these, embeddings and head are averaged unless `embeddings: matrix` says otherwise.
        Matrices are used as they are stored, assuming [outputs, inputs].
    """
    source = base.double()
    vectors = [vector.double() for vector in deltas_above_rounding(base, models, rounding)]
    none = source.new_zeros(base.shape[1], base.shape[1])
    skews = [generator(rotation(source, source + vector)) if vector.any() else none for vector in vectors]
    step = moved(source, mean_generator(skews))
    for vector, skew in zip(vectors, skews, strict=True):
        step += residual * (vector - moved(source, skew))
    return base + step.to(base.dtype)
