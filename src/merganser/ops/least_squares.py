"""Fits to what models compute from their inputs, which are known by their Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def shrunk(gram: Tensor, alpha: Tensor) -> Tensor:
    """Return a Gram matrix with its off-diagonal entries times alpha, float64."""
    regularised = gram.to(torch.float64, copy=True).mul_(alpha)
    regularised.diagonal().copy_(gram.diagonal())
    return regularised


def solve_right(pull: Tensor, total: Tensor, ridge: Tensor) -> Tensor:
    """Return pull (total + e I)^-1, where e is `ridge` times the mean of the diagonal of `total`.

    A sum of Gram matrices of fewer tokens than inputs is singular, and rounding can make it indefinite. The ridge is then
    raised tenfold until the sum is positive definite.

    Args:
        pull: Shape [m, n], float64.
        total: Shape [n, n], float64, symmetric; it is changed.
        ridge: 0-d.
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
            return torch.cholesky_solve(pull.T, factor).T
        step *= 10
