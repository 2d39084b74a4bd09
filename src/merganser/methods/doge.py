"""DOGE: add one common change to all task vectors, optimised so that their sum is close to each of them."""

from typing import Literal

import torch
from torch import Tensor

from ..method import Count, Embeddings, Fraction, Others, PerModel, Positive, default, merge_method
from ..ops import inverse_norms, magnitude_cut
from ..ops.linalg.adam import adam
from ..ops.linalg.rounding import deltas_above_rounding
from ..ops.linalg.spectral import svd

_TOLERANCE = 1e-5
"""Singular values up to this share of the largest count as rounding errors."""


def shared_directions(vectors: list[Tensor], dimensions: int) -> Tensor:
    """Return the left directions that the task vectors share most, shape [rows, at most `dimensions`]."""
    k = min(vectors[0].shape) // len(vectors)
    together = torch.cat([svd(vector, k, tolerance=_TOLERANCE).left for vector in vectors], dim=1)
    return svd(together, dimensions, tolerance=_TOLERANCE).left


def magnitudes(base: Tensor, models: list[Tensor], rounding: Tensor) -> list[Tensor]:
    """Return what the task vectors are trimmed by."""
    return [vector.abs() for vector in deltas_above_rounding(base, models, rounding)]


class RowLoss:
    """sum_j |rows(delta_j * (delta_j - sum_i factor_i (delta_i + change)))|^2, where rows() adds up each row.

    Args:
        vectors: The task vectors, shape [m, n] each.
        factors: One per task vector.
    """

    def __init__(self, vectors: list[Tensor], factors: Tensor) -> None:
        self._rows = torch.stack(vectors, dim=1)
        self._factor = factors.sum()
        sums = torch.einsum("mtn,t->mn", self._rows, factors)
        # the loss is 0 if, in every row, the sum of factors times <delta_j, change> equals this; shape [m, T]
        self._missing = (self._rows * (self._rows - sums.unsqueeze(1))).sum(dim=2)

    def gradient(self, change: Tensor) -> Tensor:
        """Return the gradient at a change, shape [m, n]."""
        left = self._missing - self._factor * torch.bmm(self._rows, change.unsqueeze(2)).squeeze(2)
        left *= -2 * self._factor
        return torch.bmm(left.unsqueeze(1), self._rows).squeeze(1)

    def least_change(self) -> Tensor:
        """Return the change of smallest norm that minimises the loss."""
        rows = self._rows.double()
        values, turn = torch.linalg.eigh(rows @ rows.mT)
        known = values > 1e-10 * values[:, -1:]
        inverse = torch.where(known, 1 / torch.where(known, values, 1.0), 0.0)
        shares = (turn * inverse.unsqueeze(1)) @ (turn.mT @ (self._missing.double() / self._factor).unsqueeze(2))
        direction: Tensor = (shares.mT @ rows).squeeze(1).to(self._rows.dtype)
        return direction


@merge_method(
    family="spectral",
    cite="wei2025doge",
    scope="matrix",
    version=3,
    models=(2, None),
    statistics={"cut": magnitude_cut(magnitudes, over="model")},
    breaks={"identical": "task vectors are divided by their norms"},
)
def doge(
    base: Tensor,
    models: list[Tensor],
    cut: Tensor | None,
    rounding: Tensor,
    *,
    eta: Positive = default(0.07),
    density: PerModel[Fraction] = default(0.3),
    solver: Literal["adam", "rows"] = "adam",
    steps: Count = 400,
    learning_rate: Positive = default(1e-4),
    subspace: Count = 6,
    others: Others = "base",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Find a common change of all task vectors that makes their sum similar to each of them, and trim them.

        factor_i = eta / |delta_i|,    delta_i = model_i - base
        L(D)     = sum_j |rows(delta_j * (delta_j - sum_i factor_i (delta_i + D)))|^2
        D        = 400 steps of Adam down (1 - P) grad L, from D = 0
        P        = projector on the floor(r / subspace) left directions that the task vectors have most in common
        merged   = base + sum_i factor_i * (delta_i + D), where |delta_i| reaches the cut of model i, else base

    rows() adds up the products along each row, and r is the shorter side of the matrix. The cut keeps the share
    `density` of all elements of a model.

    Use when:
        Experts of clearly different skills were trained from one base.

    Args:
        eta: Norm to which each task vector is scaled.
        density: Share of the elements that is kept, the largest of all matrices of the model together.
        solver: How D is computed: by Adam as in the paper, or as the change of smallest norm that minimises L, row by
            row and without P, which takes a fraction of the time.
        steps: Steps of Adam.
        learning_rate: Learning rate of Adam, which is about the distance that every element moves in a step.
        subspace: The shared directions are one in this many: 6 for a sixth.

    Differs from the paper:
        Read in the code of FusionBench, by one of the authors. That code merges the weights of encoders of CLIP; here
        all matrices are merged. It keeps one element more, and all that equal the smallest that it keeps; here those
        are kept that reach the k-th largest, k = floor(density * elements).
        Directions of a task vector that contain only rounding errors of the stored weights are left out.
        Directions of singular values up to 1e-5 of the largest are not among the shared ones, as they are arbitrary. So
        are those that are taken of equally common ones, as of equal models; a single model is refused for that reason.
        A model equal to the base does not count, instead of giving NaN.
    """
    vectors = deltas_above_rounding(base, models, rounding)
    norms = torch.stack([vector.double().square().sum().sqrt() for vector in vectors])
    factors = (eta * inverse_norms(norms)).to(base.dtype)
    if not factors.any():
        return base.clone()
    loss = RowLoss(vectors, factors)
    if solver == "rows":
        change = loss.least_change()
    else:
        shared = shared_directions(vectors, min(base.shape) // subspace)

        def gradient(point: Tensor) -> Tensor:
            slope = loss.gradient(point)
            return slope - shared @ (shared.T @ slope)

        change = adam(gradient, torch.zeros_like(base), steps, float(learning_rate))
    total = torch.zeros_like(base)
    for i, vector in enumerate(vectors):
        part = factors[i] * (vector + change)
        total += part if cut is None else torch.where(vector.abs() >= cut[i, 0], part, 0.0)
    return base + total
