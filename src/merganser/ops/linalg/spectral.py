"""Singular value decomposition and polar factor of one matrix, through its Gram matrix.

A symmetric eigenproblem costs a third of a singular value decomposition, but squares the singular values: in float32,
rounding hides singular values below 3e-4 of the largest. Therefore there are two passes, without iteration:

1. The Gram matrix in float32 gives right vectors, which rounding tilts, but only a little for large singular values.
   Their images under the matrix are nearly orthogonal; the deviation is corrected to first order.
2. The matrix is restricted to the few remaining directions, in float64, where the Gram matrix resolves singular values
   down to 1e-8 of the largest of them. The tilt between the two groups is corrected, too.

If many singular values are tiny, but not zero, the second pass costs as much as a decomposition in float64 would. Very
small matrices, and float64 ones, are decomposed directly, in float64.

Accuracy, as norm of the error over norm of the polar factor, against the float64 decomposition of the same matrix:
1e-6 to 5e-5 at condition numbers up to 1e8, where directions below `rank_tolerance` count as zero in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ...method import Number

RankTolerance = Annotated[Tensor, Number(0.0, 1.0, search=(0.0, 0.1))]
"""Parameter of methods: singular values up to this share of the largest count as zero; where it is 0, those up to the
rounding of the stored weights do."""

_DENSE = 16
"""Matrices with a side of at most this are decomposed directly."""

_LARGE = 0.1
"""Share of the largest singular value above which the first pass needs no correction: a vector is tilted by at most
1e-7 over the square of its share, and few reach that."""

_CORRECTED = 0.005
"""Share of the largest singular value above which the first pass is accurate after the correction, to the square of the
tilt. The correction costs two more matrix products."""

_FEW = 1 / 6
"""Largest share of the directions for which the second pass is cheaper than the correction."""

_COINCIDE = 1e-5

_NEAR = 64
"""Number of directions on either side of a truncation that are separated more accurately."""

_BLOCK = 512

_RESOLVED = 2.0**-14
"""Error of the squared singular values from float32, over the largest: measured are 1e-6, and this is far above."""

_SKETCHED = 8
"""One of so many columns is taken for an estimate of the leading directions."""


class Svd(NamedTuple):
    """Singular triplets, the largest first.

    Args:
        left: Left vectors, shape [m, r], orthonormal columns.
        values: Singular values, shape [r], float64.
        right: Right vectors, shape [n, r], orthonormal columns.
    """

    left: Tensor
    values: Tensor
    right: Tensor


class Polar(NamedTuple):
    """The polar factor, a partial isometry.

    Args:
        factor: Shape [m, n].
        rank: How many of its singular values are 1; the others are 0.
    """

    factor: Tensor
    rank: int


class _Basis(NamedTuple):
    """Result of the first pass.

    Args:
        squares: Squares of the singular values, shape [n], ascending.
        right: Right vectors, shape [n, n].
        n_small: Number of directions that are left to the second pass.
        tilted: Whether the others need the correction.
        cut: Singular value up to which one counts as zero, 0-d.
        settled: Whether all that are left count as zero, so that there is no second pass.
    """

    squares: Tensor
    right: Tensor
    n_small: int
    tilted: bool
    cut: Tensor
    settled: bool


def rank_tolerance(matrix: Tensor) -> float:
    """Return the share of the largest singular value up to which one counts as zero.

    In float32 it is 2**-22: entries are rounded to 2**-24 of their size, and a matrix that is of low rank but for
    that rounding has no singular value above. In float64 it is max(m, n) * 2**-52.
    """
    return max(matrix.shape) * 2.0**-52 if matrix.dtype == torch.float64 else 2.0**-22


def svd(matrix: Tensor, k: int | None = None, *, tolerance: float = 0.0, noise: float = 0.0) -> Svd:
    """Return the singular triplets of a matrix, as many as its numerical rank.

    Args:
        matrix: Shape [m, n], float32 or float64, finite; of any rank, zero or empty, too.
        k: At most that many, the largest.
        tolerance: Singular values up to this share of the largest count as zero, where that is more than
            `rank_tolerance`.
        noise: Those up to this count as zero, too.

    Returns:
        Vectors in the dtype of the matrix. Of equal singular values they are one of many bases.
    """
    m, n = matrix.shape
    if m < n:
        left, values, right = svd(matrix.T, k, tolerance=tolerance, noise=noise)
        return Svd(right, values, left)
    tolerance = max(tolerance, rank_tolerance(matrix))
    scale = _scale(matrix)
    if scale == 0 or k == 0:
        return Svd(matrix[:, :0], matrix.new_zeros(0, dtype=torch.float64), matrix[:0].T)
    matrix = matrix / scale
    if _is_dense(matrix):
        left, values, right = _dense(matrix, tolerance, noise / float(scale))
        return Svd(left[:, :k].to(matrix.dtype), values[:k] * scale, right[:, :k].to(matrix.dtype))
    large, small = _corrected(matrix, _first_pass(matrix, tolerance, noise / float(scale)), k)
    left, values, right = (torch.cat(pair, dim=-1)[..., :k] for pair in zip(large, small, strict=True))
    return Svd(left, values * scale, right)


def polar(matrix: Tensor, *, tolerance: float = 0.0) -> Polar:
    """Return the polar factor of a matrix as a partial isometry.

        matrix = U diag(s) V^T with all s above zero,   polar = U V^T

    Directions in which the matrix is zero stay zero, instead of becoming arbitrary orthonormal ones.

    Args:
        matrix: As in `svd`.
        tolerance: As in `svd`.
    """
    m, n = matrix.shape
    if m < n:
        factor, rank = polar(matrix.T, tolerance=tolerance)
        return Polar(factor.T, rank)
    tolerance = max(tolerance, rank_tolerance(matrix))
    scale = _scale(matrix)
    if scale == 0:
        return Polar(torch.zeros_like(matrix), 0)
    matrix = matrix / scale
    if _is_dense(matrix):
        left, values, right = _dense(matrix, tolerance)
        return Polar((left @ right.T).to(matrix.dtype), len(values))
    factors = _first_pass(matrix, tolerance)
    if factors.tilted:
        large, small = _corrected(matrix, factors, None)
        factor = large.left @ large.right.T
        return Polar(factor.addmm_(small.left, small.right.T), len(large.values) + len(small.values))
    # rooted^T rooted is the inverse square root of the Gram matrix
    rooted = (factors.right[:, factors.n_small :] / factors.squares[factors.n_small :] ** 0.25).T
    factor = matrix @ self_product(rooted)
    if factors.n_small == 0 or factors.settled:
        return Polar(factor, n - factors.n_small)
    small, rank, _ = _second_pass(matrix, factor, factors)
    return Polar(factor.addmm_(small.left, small.right.T), n - factors.n_small + rank)


def left_basis(matrices: Sequence[Tensor], floor: float) -> Tensor:
    """Return the left singular vectors of the concatenated matrices [A_1 ... A_T], the largest first, shape [m, r].

    Vectors of close singular values are separated, which `svd` does not do: the Gram matrix is in float64.

    Args:
        matrices: Shapes [m, n_i].
        floor: Singular values up to this, or to `rank_tolerance` of the largest, count as zero.
    """
    products = torch.zeros(2 * matrices[0].shape[:1], dtype=torch.float64, device=matrices[0].device)
    for matrix in matrices:
        products += self_product(matrix.T.double())
    squares, basis = torch.linalg.eigh(products)
    values = squares.clamp(min=0).sqrt()
    largest = values[-1] if len(values) else values.sum()
    kept = (values > floor) & (values > rank_tolerance(matrices[0]) * largest)
    vectors: Tensor = basis[:, kept].flip(1)
    return vectors.to(matrices[0].dtype)


def has_more_below(matrix: Tensor, bound: float, limit: float) -> bool:
    """Return whether the singular values below a bound clearly have a larger sum of squares than a limit.

    This needs no singular vectors, and takes about half of the time of a decomposition. Where a few directions show that
    it is not so, as of an adapter, it takes less. False is also the answer where float32 cannot decide it.

    Args:
        matrix: As in `svd`.
        bound: In the unit of the singular values.
        limit: In the unit of their squares.
    """
    m, n = matrix.shape
    scale = float(_scale(matrix))
    if scale == 0:
        return False
    bound, limit = bound / scale, limit / scale**2
    matrix = (matrix.T if m < n else matrix) / scale
    size, whole = matrix.shape[1], float(matrix.square().sum())
    # the largest square is at least their mean
    if whole <= limit or whole / size * _RESOLVED >= bound**2:
        return False
    # Ritz values are at most the squares, so that what they leave is at least what the squares leave
    few = torch.linalg.qr(matrix.T @ matrix[:, : min(size // _SKETCHED, _NEAR)]).Q
    ritz = torch.linalg.eigvalsh(self_product(matrix @ few))
    if whole - float(ritz[ritz > bound**2].sum()) <= limit:
        return False
    squares = torch.linalg.eigvalsh(self_product(matrix)).double()
    error = _RESOLVED * squares[-1]
    return float((squares[squares < bound**2 - error] - error).clamp(min=0).sum()) > limit


def nuclear_norm(factor: Tensor, matrix: Tensor) -> Tensor:
    """Return the sum of the singular values, 0-d, float64.

    Args:
        factor: The polar factor of the matrix.
        matrix: Shape [m, n].
    """
    return (factor * matrix).sum(dtype=torch.float64)


def orthogonalised(frames: Sequence[Tensor]) -> Tensor:
    """Return the nearest matrix with orthonormal columns to concatenated orthonormal frames, as a partial isometry.

    Directions in which frames coincide to 1e-5 (their accuracy) have no unique nearest matrix and stay zero.

    Args:
        frames: Shapes [n, k_i], each with orthonormal columns.
    """
    return polar(torch.cat(list(frames), dim=1), tolerance=_COINCIDE).factor


def joined(parts: Sequence[Svd]) -> Tensor:
    """Return the sum of the triplets of several matrices after orthogonalising the vectors of all of them, [m, n].

    Args:
        parts: Triplets; the values may have any sign.
    """
    values = torch.cat([part.values for part in parts])
    left = orthogonalised([part.left for part in parts])
    return left * values.to(left.dtype) @ orthogonalised([part.right for part in parts]).T


def self_product(matrix: Tensor) -> Tensor:
    """Return A^T A, shape [n, n], exactly symmetric: only one triangle of its blocks is computed."""
    n = matrix.shape[1]
    product = matrix.new_empty(n, n)
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        strip = matrix[:, start:end].T @ matrix[:, :end]
        product[start:end, :end] = strip
        product[:start, start:end] = strip[:, :start].T
    return product


def _scale(matrix: Tensor) -> Tensor:
    """Return the power of two above the largest magnitude, so that dividing by it is exact; 0 if all are 0."""
    largest = matrix.abs().amax() if matrix.numel() else matrix.new_zeros(())
    return torch.where(largest > 0, torch.exp2(torch.frexp(largest).exponent.to(matrix.dtype)), largest)


def _is_dense(matrix: Tensor) -> bool:
    return matrix.shape[1] <= _DENSE or matrix.dtype == torch.float64


def _dense(matrix: Tensor, tolerance: float, noise: float = 0.0) -> Svd:
    """Decompose a matrix directly, in float64."""
    left, values, right = _triplets(matrix.double())
    rank = int((values > max(tolerance * float(values[0]), noise)).sum())
    return Svd(left[:, :rank], values[:rank], right[:rank].T)


def _triplets(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `torch.linalg.svd` does, also of matrices for which it does not converge as they are.

    LAPACK fails on some that have hundreds of equal singular values, such as projections. Their transposes, or their rows in
    reverse order, have the same values, and take other ways through it.
    """
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    try:
        right, values, left = torch.linalg.svd(matrix.T, full_matrices=False)
        return left.T, values, right.T
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        left, values, right = torch.linalg.svd(matrix.flip(0), full_matrices=False)
        return left.flip(0), values, right


def _first_pass(matrix: Tensor, tolerance: float, noise: float = 0.0) -> _Basis:
    """Find the right singular vectors of a matrix of float32, m >= n, whose largest entry is near 1."""
    squares, right = torch.linalg.eigh(self_product(matrix))
    largest = float(squares[-1].sqrt())
    zero = min(max(tolerance, noise / largest), 1.0)

    def count(share: float) -> int:
        return int((squares <= max(share, zero) ** 2 * squares[-1]).sum())

    n_small = count(_LARGE)
    tilted = n_small > _FEW * len(squares)
    least = _CORRECTED if tilted else _LARGE
    return _Basis(squares, right, count(least), tilted, squares.new_tensor(zero * largest), zero >= least)


def _corrected(matrix: Tensor, found: _Basis, k: int | None) -> tuple[Svd, Svd]:
    """Return the triplets of the large and those of the small directions; at most k, where the large are as many."""
    if k is not None and k < matrix.shape[1]:
        _part(matrix, found.right, k)
    right = found.right[:, found.n_small :].flip(1)[:, :k]
    left, values = _orthonormal_image(matrix, right)
    if found.n_small == 0 or found.settled or (k is not None and k <= right.shape[1]):
        return Svd(left, values, right), Svd(left[:, :0], values[:0], right[:, :0])
    small, rank, shown = _second_pass(matrix, left, found)
    # to first order, the angles by which the right vectors of the two groups are tilted towards each other
    tilt = shown / (values[:, None] + small.values).float()
    large = Svd(left, values, right + small.right @ tilt.T)
    return large, Svd(small.left[:, :rank], small.values[:rank], (small.right - right @ tilt)[:, :rank])


def _part(matrix: Tensor, right: Tensor, k: int) -> None:
    """Separate the k largest directions from the others, in place, because the Gram matrix mixes close neighbours.

    Args:
        matrix: Shape [m, n].
        right: Right vectors, shape [n, n], the smallest first.
        k: Less than n.
    """
    border = right.shape[1] - k
    near = slice(max(border - _NEAR, 0), border + _NEAR)
    # orthonormal in float64: float32 rounding errors of the basis would appear in the inner products of the images
    basis = torch.linalg.qr(right[:, near].double()).Q
    image = (matrix @ basis.float()).double()
    right[:, near] = (basis @ torch.linalg.eigh(image.T @ image).eigenvectors).float()


def _orthonormal_image(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the polar factor of matrix @ basis, and the norms of the columns of that product, float64.

    Up to rounding, the basis consists of right singular vectors. The Gram matrix of the product is therefore
    D (1 + E) D, with D diagonal and E small: to first order the polar factor is image * (1 / D - E_ij / (D_i + D_j)).
    """
    image = matrix @ basis
    weights = self_product(image)
    norms = weights.diagonal().sqrt()
    weights /= torch.outer(-norms, norms)
    weights /= norms + norms[:, None]
    weights.diagonal().copy_(1 / norms)
    return image @ weights, norms.double()


def _second_pass(matrix: Tensor, large: Tensor, found: _Basis) -> tuple[Svd, int, Tensor]:
    """Decompose a matrix restricted to its small directions.

    Args:
        matrix: Shape [m, n].
        large: The large left directions, orthonormal columns, or their polar factor; shape [m, l].
        found: Result of the first pass; s of its directions are small.

    Returns:
        Triplets of all s, with zero left vectors beyond the rank; the rank; and the components of the large left
        directions in the images of the small ones, which rounding has tilted, shape [l, s].
    """
    basis = found.right[:, : found.n_small]
    image = matrix.double() @ basis.double()
    shown = large.T @ image.float()
    image -= large @ shown
    products = self_product(image)
    if products.norm() <= found.cut.double() ** 2:
        zero = torch.zeros_like(image[0])
        return Svd(torch.zeros_like(matrix[:, : found.n_small]), zero, basis), 0, shown
    squares, turn = torch.linalg.eigh(products)
    turn, values = turn.flip(1), squares.flip(0).clamp(min=0).sqrt()
    above = values > found.cut
    left = image.float() @ torch.where(above, turn / values, 0.0).float()
    turn = turn.float()
    return Svd(left, values, basis @ turn), int(above.sum()), shown @ turn
