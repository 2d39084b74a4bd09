"""The interference between task vectors of a matrix, a quadratic function of their merge, and ways to minimise it.

    L(M) = sum_i weight_i |(M - target_i) source_i^T|^2

It measures how far the merge M differs from each target on the estimated inputs of that task: the rows of its source.
With

    C = sum_i weight_i source_i^T source_i = V diag(c) V^T
    P = sum_i weight_i (target_i - start) source_i^T source_i

the minimum is start + P C^+, and a spectral filter f, with values from 0 to 1, goes part of the way in each
eigenvector's direction:

    M = start + P V diag(f(c) / c) V^T

The weights are 1 / |task vector|^2, so that the eigenvalues c add up to at most the number of tasks. There is no step
in directions with c below 1e-8, since c is only rounding error there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .adam import adam
from .spectral import self_product

Start = Literal["sum", "mean", "zero"]
Solver = Literal["filter", "minimum", "adam"]

_FLOOR = 1e-8


def starting_point(vectors: Sequence[Tensor], start: Start) -> Tensor:
    """Return the sum of task vectors, their mean, or zero, float64."""
    total = torch.zeros_like(vectors[0], dtype=torch.float64)
    if start != "zero":
        for vector in vectors:
            total += vector
    return total / len(vectors) if start == "mean" else total


def inverse_squares(tensors: Sequence[Tensor]) -> list[float]:
    """Return 1 / |tensor|^2 of each tensor, and 0 for zero tensors."""
    squares = [float(tensor.double().square().sum()) for tensor in tensors]
    return [1 / square if square > 0 else 0.0 for square in squares]


class Interference:
    """The interference function and a starting point. Computed in float64, because C has squared singular values.

    Args:
        targets: One matrix per task, shape [m, n].
        sources: One matrix per task, shape [k, n]; k may differ between tasks.
        weights: One factor per task.
        start: Shape [m, n], float64.
    """

    def __init__(
        self, targets: Sequence[Tensor], sources: Sequence[Tensor], weights: Sequence[float], start: Tensor
    ) -> None:
        self._start = start
        self._dtype = targets[0].dtype
        # A^T h(A A^T) = h(A^T A) A^T: if the stacked sources A have fewer rows than columns, the smaller matrix A A^T
        # replaces C = A^T A
        self._rows: Tensor | None = None
        tasks = list(zip(targets, sources, weights, strict=True))
        if sum(map(len, sources)) < start.shape[1]:
            self._rows = torch.cat(
                [source.double() * weight**0.5 for source, weight in zip(sources, weights, strict=True)]
            )
            self._gram = self_product(self._rows.T)
            pulls = [(target - start) @ (source.double().T * weight**0.5) for target, source, weight in tasks]
            self._pull = torch.cat(pulls, dim=1)
            return
        self._gram = start.new_zeros(start.shape[1], start.shape[1])
        self._pull = torch.zeros_like(start)
        for target, source, weight in tasks:
            products = self_product(source.double()).mul_(weight)
            self._pull.addmm_(target - start, products)
            self._gram += products

    def filtered(self, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the point that a spectral filter reaches on the way to the minimum.

        Args:
            gain: Returns f(c) / c for the eigenvalues c of C, float64, ascending. Eigenvalues that are zero because of
                the shapes of the sources may be missing.

        Returns:
            Shape [m, n], float64.
        """
        values, vectors = torch.linalg.eigh(self._gram)
        step = self._pull @ vectors
        step = (step * torch.where(values > _FLOOR, gain(values.clamp(min=0)), 0.0)) @ vectors.T
        point: Tensor = self._start + (step if self._rows is None else step @ self._rows)
        return point

    def descended(self, steps: int, learning_rate: float) -> Tensor:
        """Return the point after some steps of Adam, taken in the dtype of the targets, as float64."""
        pull, curvature, rows = self._pull, self._gram, self._rows
        if rows is not None:
            pull = pull @ rows
            curvature = self_product(rows)
        pull, curvature = pull.to(self._dtype), curvature.to(self._dtype)

        def gradient(step: Tensor) -> Tensor:
            slope: Tensor = step @ curvature
            return slope.sub_(pull).mul_(2)

        return self._start + adam(gradient, torch.zeros_like(pull), steps, learning_rate)

    def solved(self, solver: Solver, time: Tensor, steps: int, learning_rate: Tensor) -> Tensor:
        """Return the point that `solver` reaches, float64: exponential filter, steps of Adam, or the minimum itself."""
        if solver == "adam":
            return self.descended(steps, float(learning_rate))
        if solver == "minimum":
            return self.filtered(inverse)
        return self.filtered(lambda values: exponential(values, time))


def strongest(values: Tensor, k: int) -> Tensor:
    """Return which of the eigenvalues, in ascending order, are the k largest, bool."""
    return torch.arange(len(values), device=values.device) >= len(values) - k


def inverse(values: Tensor) -> Tensor:
    """Return the gain that leads to the minimum: 1 / c, that is f(c) = 1."""
    return 1 / values.clamp(min=_FLOOR)


def exponential(values: Tensor, time: Tensor) -> Tensor:
    """Return the gain of f(c) = 1 - exp(-c * time), the filter of gradient flow on L / 2 for that time."""
    safe = values.clamp(min=_FLOOR)
    return -torch.expm1(-safe * time) / safe
