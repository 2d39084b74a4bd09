"""ACE: weigh the task vectors by estimates of the covariance of their inputs, made from the task vectors themselves."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..method import Embeddings, Fraction, Others, Positive, Scale, default, merge_method
from ..ops.linalg.rounding import deltas_above_rounding
from ..ops.linalg.spectral import self_product, svd

Normalize = Literal["auto", "always", "never"]

_HETEROGENEOUS = 0.3
"""Spread of the sizes of task vectors above which their covariances are normalised."""

_TINY = 1e-12


class _Sums(NamedTuple):
    """What is added up over the tasks, float64; C_i is the covariance and e_i the ridge of task i.

    Args:
        pull: sum_i D_i (C_i + e_i I), shape [m, n].
        covariance: sum_i C_i, shape [n, n].
        ridge: sum_i e_i.
        residual: sum_i D_i C_i, shape [m, n].
        vectors: sum_i D_i, shape [m, n].
        tasks: Number of tasks.
    """

    pull: Tensor
    covariance: Tensor
    ridge: float
    residual: Tensor
    vectors: Tensor
    tasks: int


def spread(squares: Tensor) -> float:
    """Return the variance of the logarithms of the squared norms over the square of their mean; 0 of one task.

    Args:
        squares: Squared norms of the task vectors, shape [T], float64.
    """
    logs = torch.log(squares + _TINY)
    return float(logs.var() / (logs.mean().square() + _TINY)) if len(logs) > 1 else 0.0


def add_up(vectors: list[Tensor], ridge: float, normalized: bool) -> _Sums:
    """Add up the estimated covariances of the tasks.

    Args:
        vectors: Shape [m, n], float64, none of them zero.
        ridge: Added to the diagonal of every covariance, before it is normalised.
        normalized: Whether to divide by the trace.
    """
    first = vectors[0]
    pull, residual, total = torch.zeros_like(first), torch.zeros_like(first), torch.zeros_like(first)
    covariances = first.new_zeros(first.shape[1], first.shape[1])
    ridges = 0.0
    for vector in vectors:
        covariance = self_product(vector)
        own = ridge
        if normalized:
            trace = float(covariance.trace()) + _TINY
            covariance /= trace
            own /= trace
        product = vector @ covariance
        residual += product
        pull += product + own * vector
        total += vector
        covariances += covariance
        ridges += own
    return _Sums(pull, covariances, ridges, residual, total, len(vectors))


def solved(sums: _Sums, scale: float) -> Tensor:
    """Return pull A^-1 for A = S + 1 c^T, where S is the sum of the covariances with their ridges, float64.

    S is positive definite and A is not symmetric, so A is inverted by the formula of Sherman and Morrison. Its
    denominator is at least 1, because S and the sum of the covariances have the same eigenvectors.

    Args:
        sums: From `add_up`.
        scale: What the mean row of the covariances is divided by to get c.
    """
    shifted = sums.covariance.clone()
    shifted.diagonal().add_(sums.ridge)
    lower = torch.linalg.cholesky(shifted)
    prior = sums.covariance.mean(0) / scale
    step = torch.cholesky_solve(sums.pull.T, lower).T
    row = torch.cholesky_solve(prior[:, None], lower)[:, 0]
    return step - torch.outer(step.sum(1) / (1 + row.sum()), row)


def refinement(sums: _Sums, step: Tensor, fraction: float, dtype: torch.dtype) -> Tensor:
    """Return the leading singular directions of what the solution misses of each task, at their mean strength.

    Args:
        sums: From `add_up`.
        step: From `solved`.
        fraction: Share of min(m, n) that is refined.
        dtype: In which the directions are computed, the one of the inputs.
    """
    mean = sums.vectors @ sums.covariance + sums.ridge * sums.vectors
    missed = sums.residual - mean / sums.tasks + step
    count = int(min(missed.shape) * fraction)
    decomposition = svd(missed.to(dtype), k=count)
    if not len(decomposition.values):
        return torch.zeros_like(step)
    return decomposition.values.mean() * (decomposition.left.double() @ decomposition.right.double().T)


@merge_method(
    family="spectral",
    cite="xu2026ace",
    scope="matrix",
    version=2,
    breaks={"identical": "the mean row of the task vectors is lost, and the prior moves the rest"},
)
def ace(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    lambda_: Scale = default(1.0),
    ridge: Positive = default(0.01),
    normalize: Normalize = "auto",
    refine: Fraction = default(0.3),
    center: bool = True,
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Solve for the matrix that acts like each task vector on its estimated inputs, with a ridge and a common prior.

        D_i    = delta_i - mean row of delta_i,   delta_i = model_i - base
        C_i    = D_i^T D_i,   e_i = ridge;   both divided by trace(D_i^T D_i) if the tasks are heterogeneous
        A      = sum_i (C_i + e_i I) + 1 c^T,   c = mean row of sum_i C_i
        W      = sum_i D_i (C_i + e_i I) A^-1
        merged = base + lambda * W

    If they are heterogeneous, c is also divided by the mean of |delta_i|^2, and W gains

        R     = sum_i D_i (C_i - mean_j (C_j + e_j I)) + W = U diag(s) V^T,   k = floor(refine * min(rows, columns))
        W    += mean(s_1 ... s_k) * U_k V_k^T

    Tasks are heterogeneous if the variance of log |delta_i|^2 exceeds 0.3 times its squared mean.

    Use when:
        Experts of clearly different skills were trained from one base, and no data is available: an alternative to
        WUDI without steps or a time.

    Args:
        lambda_: Factor of the merged task vector.
        ridge: Added to the diagonal of every covariance. Where it is large compared to |delta_i|^2 over the number of
            columns, the merge is near the average; the smaller, the nearer to WUDI's minimum.
        normalize: Treat all matrices as heterogeneous, none, or those that are by the rule above.
        refine: Share of the singular directions that heterogeneous matrices gain.
        center: Whether the mean row is subtracted from each task vector, from what is merged as well as from the
            covariance. A matrix of one row is never centred, because nothing would be left.

    Differs from the paper:
        Directions of a task vector that contain only rounding errors of the stored weights are left out.
        Formula and constants were compared with the authors' code, not with the paper: `ridge`, the rule of
        heterogeneity and, through |delta_i|^2, the prior depend on the scale of the task vectors there, and so here.
        A model equal to the base is left out; in published code it draws heterogeneous matrices to the base.
        The refinement takes at most as many directions as R has; published code gives the others arbitrary vectors.
        The authors' code always centres. Matrices are used as they are stored, assuming [outputs, inputs].
        Embeddings and head are averaged unless `embeddings: matrix` says otherwise.
    """
    vectors = [vector.double() for vector in deltas_above_rounding(base, models, rounding)]
    vectors = [vector for vector in vectors if vector.any()]
    squares = torch.tensor([float(vector.square().sum()) for vector in vectors], dtype=torch.float64)
    if center and len(base) > 1:
        vectors = [vector - vector.mean(0) for vector in vectors]
    if not vectors:
        return base.clone()
    heterogeneous = normalize == "always" or (normalize == "auto" and spread(squares) > _HETEROGENEOUS)
    sums = add_up(vectors, float(ridge), heterogeneous)
    step = solved(sums, float(squares.mean()) + _TINY if heterogeneous else 1.0)
    if heterogeneous:
        step += refinement(sums, step, float(refine), base.dtype)
    return base + lambda_ * step.to(base.dtype)
