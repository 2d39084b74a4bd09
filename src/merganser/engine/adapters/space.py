"""Small matrices that stand for the changes of adapters, without loss: the core space of their factors.

The lefts of all adapters, side by side, span at most the sum of their ranks, and so do the rights. In orthonormal bases of
both, each change is a small matrix. What a method makes of these is expanded by the same bases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...ops.linalg.spectral import svd

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Space", "Truncated", "open_space"]

_PARALLEL = 1e-13
"""Eigenvalue of the Gram matrix of unit vectors, over the largest, up to which a direction is rounding."""

Pair = tuple["Tensor", "Tensor"]


@dataclass(frozen=True, slots=True)
class Truncated:
    """Factors of a merged change.

    Args:
        left: Shape [m, r].
        right: Shape [r, n].
        norm: Norm of the whole change.
        error: Norm of what the factors leave out.
    """

    left: Tensor
    right: Tensor
    norm: float
    error: float


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of the factors of all adapters: unit vectors, their lengths, and a basis of what they span.

    Args:
        units: Shape [size, R], float64; None if this side is not reduced.
        basis: Shape [R, k]: units @ basis is orthonormal.
        coordinates: Shape [k, R]: units in that basis.
    """

    units: Tensor
    basis: Tensor
    coordinates: Tensor


@dataclass(frozen=True, slots=True)
class Space:
    """The changes of adapters as small matrices.

    Args:
        matrices: One per adapter, float64, shape [k, l].
        left: How rows are expanded; None if they are those of the weight.
        right: How columns are expanded; None if they are those of the weight.
    """

    matrices: list[Tensor]
    left: _Side | None
    right: _Side | None

    def expand(self, merged: Tensor, rank: int | None) -> Truncated:
        """Return factors of what a merged matrix stands for.

        Args:
            merged: Shape [k, l].
            rank: At most this rank; None for all that there is.
        """
        found = svd(merged.double())
        norm = float(torch.linalg.vector_norm(merged.double()))
        kept = len(found.values) if rank is None else min(rank, len(found.values))
        error = float(found.values[kept:].norm())
        root = found.values[:kept].sqrt()
        left, right = found.left[:, :kept] * root, (found.right[:, :kept] * root).T
        if self.left is not None:
            left = self.left.units @ (self.left.basis @ left)
        if self.right is not None:
            right = (right @ self.right.basis.T) @ self.right.units.T
        return Truncated(left, right, norm, error)


def open_space(pairs: Sequence[Pair | None], *, reduce_left: bool = True, reduce_right: bool = True) -> Space:
    """Express low-rank matrices left @ right in common bases.

    Args:
        pairs: Factors of each, shapes [m, r] and [r, n]; None for a zero matrix. At least one is given.
        reduce_left: Whether rows are reduced to a basis of what the lefts span.
        reduce_right: The same of columns and rights.
    """
    present = [pair for pair in pairs if pair is not None]
    lefts, rights = [pair[0].double() for pair in present], [pair[1].double().T for pair in present]
    left, left_lengths = _units(torch.cat(lefts, dim=1))
    right, right_lengths = _units(torch.cat(rights, dim=1))
    scales = left_lengths * right_lengths
    own_left = _side(left) if reduce_left else None
    own_right = _side(right) if reduce_right else None
    rows = left if own_left is None else own_left.coordinates
    columns = right if own_right is None else own_right.coordinates
    matrices, at = [], 0
    for pair in pairs:
        if pair is None:
            matrices.append(rows.new_zeros(rows.shape[0], columns.shape[0]))
            continue
        span = slice(at, at + pair[0].shape[1])
        at = span.stop
        matrices.append((rows[:, span] * scales[span]) @ columns[:, span].T)
    return Space(matrices, own_left, own_right)


def _units(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return columns of length 1, or 0, and their lengths: a short vector counts as much as a long one."""
    lengths = torch.linalg.vector_norm(vectors, dim=0)
    return vectors.div_(lengths.clamp(min=torch.finfo(vectors.dtype).tiny)), lengths


def _side(units: Tensor) -> _Side:
    squares, vectors = torch.linalg.eigh(units.T @ units)
    kept = squares > _PARALLEL * squares[-1].clamp(min=1e-300)
    kept[-1] = True
    root = squares[kept].clamp(min=1e-300).sqrt()
    return _Side(units, vectors[:, kept] / root, (vectors[:, kept] * root).T)
