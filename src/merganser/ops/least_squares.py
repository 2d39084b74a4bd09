"""Fits to what models compute from their inputs, which are known by their Gram matrices."""

from __future__ import annotations

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
