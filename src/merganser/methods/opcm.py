"""OPCM: merge models one after the other, each projected to be orthogonal to those before."""

from __future__ import annotations

import torch
from torch import Tensor

from ..method import Count, Embeddings, Fraction, Others, Positive, default, merge_method, statistic
from ..ops.linalg.rounding import deltas_above_rounding
from ..ops.linalg.spectral import self_product

_TOLERANCE = 1e-5
"""Singular values up to this share of the largest count as rounding errors."""


def triplets(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular triplets above the tolerance, the largest first: left [m, r], values [r], right [n, r].

    Later models are projected onto the merge of earlier ones, so rounding errors grow from model to model. In float64
    the Gram matrix gives singular values of 1e-5 of the largest with a relative error of 1e-6, and costs no more than a
    decomposition in float32.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = triplets(matrix.T)
        return right, values, left
    squares, right = torch.linalg.eigh(self_product(matrix))
    values = squares.clamp(min=0).sqrt().flip(0)
    rank = int((values > _TOLERANCE * values[0]).sum())
    values, right = values[:rank], right.flip(1)[:, :rank]
    return matrix @ right / values, values, right


def add_projected(merged: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    """Add the part of a task vector that it does not share with the merge so far, shape [m, n], float64.

    With merged = U S V^T, the removed part is the diagonal of U^T delta V, and its leading block, of the singular
    values that add up to the share alpha of their sum.
    """
    left, values, right = triplets(merged)
    # a share that exceeds alpha only by rounding counts as equal to it
    block = int((values.cumsum(0) <= float(alpha) * values.sum() * (1 + 1e-9)).sum())
    image = delta @ right
    shared = left * (left * image).sum(dim=0)
    shared[:, :block] = left[:, :block] @ (left[:, :block].T @ image[:, :block])
    return merged + (delta - shared @ right.T)


def changes(base: Tensor, models: list[Tensor], rounding: Tensor) -> list[Tensor]:
    """Return the task vectors without their rounding, float64."""
    return [delta.double() for delta in deltas_above_rounding(base, models, rounding)]


def merge_all(vectors: list[Tensor], alpha: Tensor, scale: Tensor) -> Tensor:
    """Return the sum of projected task vectors, before it is scaled down, float64."""
    first, *others = vectors
    merged = first * scale.double()
    for delta in others:
        merged = add_projected(merged, delta, alpha)
    return merged


def squared_norms(base: Tensor, models: list[Tensor], rounding: Tensor, alpha: Tensor, scale: Tensor) -> Tensor:
    """Measure the squared norms of the task vectors and of what is merged, shape [T + 1], float64."""
    vectors = changes(base, models, rounding)
    return torch.stack([tensor.square().sum() for tensor in (*vectors, merge_all(vectors, alpha, scale))])


def divisor(measured: Tensor, merged: int) -> Tensor:
    """Return the norm of the merge over the mean norm of the task vectors, 0-d; 1 if all task vectors are zero."""
    first, *others, total = measured.sqrt()
    mean = (merged * first + sum(others)) / (merged + len(others))
    return torch.where(mean > 0, total / torch.where(mean > 0, mean, torch.ones_like(mean)), 1.0)


@merge_method(
    family="spectral",
    cite="tang2025opcm",
    scope="matrix",
    version=3,
    statistics={"scale_after": statistic(squared_norms, divisor, over="model")},
    breaks={"order": "each model is projected away from those before it"},
)
def opcm(
    base: Tensor,
    models: list[Tensor],
    scale_after: Tensor,
    rounding: Tensor,
    *,
    alpha: Fraction = default(0.5),
    merged: Count = 1,
    scale: Positive = default(1.0),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Merge models one after the other: project each task vector away from the merge so far, and keep the mean norm.

        D_1    = delta_1,    delta_k = model_k - base
        D_k    = D_(k-1) + delta_k - U (mask * (U^T delta_k V)) V^T,    D_(k-1) = U S V^T
        mask   = 1 on the diagonal, and on the block of the first a rows and columns, else 0;
                 a = how many singular values add up to at most alpha of their sum
        merged = base + D_T / scale_after,    scale_after = |D_T| / mean_k |delta_k|, over all matrices of the model

    Use when:
        Models arrive one by one, and earlier ones are not kept: a later merge continues from the result of this one.

    To continue, give the result as the first model, with `merged`, the number of models that it contains, and `scale`,
    the `scale_after` of its run record (`merge.json`, under `statistics`).

    Args:
        alpha: Share of the singular values whose directions later models do not change at all.
        merged: Number of models that the first one is a merge of.
        scale: `scale_after` of that merge; 1 if the first model is not a merge.

    Differs from the paper:
        Directions of a task vector that contain only rounding errors of the stored weights are left out.
        Norms are those of the matrices; the paper counts all tensors, and merges those that are not matrices by the
        same sum and scale, without projection.
        In directions in which nothing was merged yet (singular values up to 1e-5 of the largest) the diagonal stays.
        The authors remove it there, too, where singular vectors are arbitrary.
        All singular values belong to the block where alpha is 1; the authors' code has an empty block there.
        The order is that of the recipe; the authors shuffle.
    """
    return base + (merge_all(changes(base, models, rounding), alpha, scale) / scale_after).to(base.dtype)
