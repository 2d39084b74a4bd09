"""Fits to what models compute from their inputs, which are known by their Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def shrunk(gram: Tensor, alpha: Tensor) -> Tensor:
    """Return a Gram matrix with its off-diagonal entries times alpha, float64."""
    regularised = gram.to(torch.float64, copy=True).mul_(alpha)
    regularised.diagonal().copy_(gram.diagonal())
    return regularised


def solve_right(
    pull: Tensor, total: Tensor, ridge: Tensor, *, start: Tensor | None = None, longest: Tensor | None = None
) -> Tensor:
    """Return pull (total + e I)^-1, where e is `ridge` times the mean of the diagonal of `total`.

    A sum of Gram matrices of fewer tokens than inputs is singular, and rounding can make it indefinite. The ridge is then
    raised tenfold until the sum is positive definite. It is raised likewise until `start` and the result together are no
    longer than `longest`: where a few tokens of huge inputs rule the sum, the exact fit goes far to reproduce these.

    Args:
        pull: Shape [m, n], float64.
        total: Shape [n, n], float64, symmetric; it is changed.
        ridge: 0-d.
        start: To what the result is added, shape [m, n], no longer than `longest`; zero if it is not given.
        longest: Largest length of the sum, 0-d; any if it is not given.
    """
    step = float(ridge * total.diagonal().mean())
    if not step > 0:
        return torch.zeros_like(pull)
    added = 0.0
    while True:
        total.diagonal().add_(step - added)
        added = step
        factor, failed = torch.linalg.cholesky_ex(total)
        if not failed:
            found = torch.cholesky_solve(pull.T, factor).T
            if longest is None or not (found if start is None else start + found).norm() > longest:
                return found
        step *= 10


def fit_outputs(
    vectors: Sequence[Tensor],
    gram: Sequence[Tensor] | None,
    weight: Tensor,
    alpha: Tensor,
    ridge: Tensor,
    limit: Tensor,
    *,
    start: Literal["average", "base"],
) -> Tensor:
    """Return the matrix, minus the base, whose outputs are closest to those of all models on the inputs of each.

        R + (sum_i weight_i (delta_i - R) G_i) (sum_i weight_i G_i + e I)^-1,  G_i = gram_i, off-diagonals times alpha

    Args:
        vectors: Task vectors delta_i, shape [m, n].
        gram: Mean of x x^T over the inputs of each model, shape [n, n]; None to return the weighted average.
        weight: How much a model's inputs count, shape [T].
        alpha: Factor of the off-diagonal entries, 0-d.
        ridge: e, over the mean of the diagonal of the sum, 0-d.
        limit: Largest length of the result, over the largest length of a task vector, 0-d; the ridge is raised to keep it.
        start: R: the weighted average of the task vectors, or zero.

    Returns:
        Float64, shape [m, n].
    """
    wide = [vector.double() for vector in vectors]
    total_weight = weight.sum().clamp(min=1e-30)
    mean = sum((w * vector for w, vector in zip(weight, wide, strict=True)), torch.zeros_like(wide[0])) / total_weight
    if gram is None:
        return mean
    reference = mean if start == "average" else torch.zeros_like(mean)
    pull = torch.zeros_like(mean)
    total = mean.new_zeros(mean.shape[1], mean.shape[1])
    for w, vector, own in zip(weight, wide, gram, strict=True):
        inputs = shrunk(own, alpha).mul_(w)
        pull.addmm_(vector - reference, inputs)
        total += inputs
    # R itself may be longer, where the limit is below 1
    longest = torch.maximum(limit * torch.stack([own.norm() for own in wide]).max(), reference.norm() * (1 + 1e-9))
    return reference + solve_right(pull, total, ridge, start=reference, longest=longest)
