"""Reversible model merging: low-rank factors of all task vectors, stored in a common basis."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..method import (
    Count,
    Embeddings,
    Encoded,
    Kept,
    Lossless,
    Part,
    PerModel,
    Scale,
    Sidecar,
    Weight,
    default,
    merge_method,
)
from ..ops import check_total, deltas, factor, weighted_sum


class Space(NamedTuple):
    """Principal components of T vectors at each of P positions.

    Args:
        mean: Shape [P, R].
        basis: Shape [P, p, R], orthonormal rows; zero rows if the vectors span fewer dimensions.
        codes: Shape [T, P, p].
    """

    mean: Tensor
    basis: Tensor
    codes: Tensor


def components(vectors: Tensor, count: int) -> Space:
    """Find the principal components at each position, in float64.

    Args:
        vectors: Shape [T, P, R].
        count: Number of components, p.
    """
    wide = vectors.double().transpose(0, 1)
    mean = wide.mean(dim=1)
    centred = wide - mean.unsqueeze(1)
    # the T x T Gram matrix is smaller than the R x R covariance
    squares, turn = torch.linalg.eigh(centred @ centred.mT)
    turn = turn.flip(2)[:, :, :count]
    values = squares.flip(1)[:, :count].clamp(min=0).sqrt()
    floor = values[:, :1] * 1e-7
    inverse = torch.where(values > floor, 1 / values, 0.0)
    basis = (centred.mT @ turn * inverse.unsqueeze(1)).mT
    return Space(mean, basis, (centred @ basis.mT).transpose(0, 1))


def sizes(shape: tuple[int, ...], n_models: int, rank: int, basis: int) -> tuple[int, int]:
    """Return the rank of the factors and the number of components, limited by the shape and the number of models."""
    r = min(rank, *shape)
    return r, min(basis, n_models - 1, r)


def parts(shape: tuple[int, ...], n_models: int, rank: int, basis: int) -> dict[str, Part]:
    """Declare what is stored for a matrix: means and bases shared by all tasks, and codes of each task."""
    r, p = sizes(shape, n_models, rank, basis)
    declared = {}
    for side, size in zip(("left", "right"), shape, strict=True):
        declared[f"{side}_mean"] = Part((size, r), shared=True)
        declared[f"{side}_basis"] = Part((size, p, r), shared=True)
        declared[f"{side}_codes"] = Part((size, p))
    return declared


def encode(
    base: Tensor,
    models: list[Tensor],
    *,
    rank: Count = 16,
    basis: Count = 1,
    others: Kept = "own",
    embeddings: Embeddings = "others",
) -> Encoded:
    """Return means, bases and codes of the factors of the task vectors."""
    r, p = sizes(tuple(base.shape), len(models), rank, basis)
    pairs = [factor(model - base, r) for model in models]
    encoded: dict[str, Tensor | list[Tensor]] = {}
    for side, factors in zip(("left", "right"), zip(*pairs, strict=True), strict=True):
        space = components(torch.stack(factors), p)
        encoded |= {f"{side}_mean": space.mean, f"{side}_basis": space.basis, f"{side}_codes": list(space.codes)}
    return encoded


def decode(
    base: Tensor,
    left_mean: Tensor,
    left_basis: Tensor,
    left_codes: Tensor,
    right_mean: Tensor,
    right_basis: Tensor,
    right_codes: Tensor,
) -> Tensor:
    """Return the base plus the product of the task's restored factors."""
    left = left_mean + (left_codes.unsqueeze(1) @ left_basis).squeeze(1)
    right = right_mean + (right_codes.unsqueeze(1) @ right_basis).squeeze(1)
    return base + left @ right.T


@merge_method(
    family="sidecars",
    cite="alipour2025rmm",
    validate=check_total,
    sidecar=Sidecar(
        parts,
        encode,
        decode,
        scope="matrix",
        matrices=True,
        lossless=Lossless({"rank": 1 << 20, "basis": 1 << 20, "embeddings": "matrix"}),
    ),
)
def rmm(
    base: Tensor, models: list[Tensor], *, weight: PerModel[Weight] = default(1.0), lambda_: Scale = default(1.0)
) -> Tensor:
    """Average the task vectors, and store their low-rank factors in a basis that the tasks share.

        merged  = base + lambda * sum_i weight_i * delta_i / sum_i weight_i,   delta_i = model_i - base

    To restore the models, data are stored for each matrix. The task vectors are factored, delta_i ~ A_i B_i of rank R;
    for each row of the A_i, and each column of the B_i, the T vectors of R numbers are

        a_i ~ mean + sum_{j <= p} code_ij * component_j

    with mean and the p principal components for all tasks together, and p codes for each.

    Use when:
        Many LoRA fine-tunes, merged into full weights, should be stored together: with p small, a further task costs
        very little. With p = T - 1 their approximations of rank R are restored exactly.

    Args:
        weight: Share of each task vector in the merged model; restoring does not depend on it.
        lambda_: Factor of the average; restoring does not depend on it.
        rank: R; the smaller side of a matrix if that is less. Fine-tunes by LoRA have the rank of their adapters.
        basis: p, at most one less than the number of models.
        embeddings: Whether embeddings and head are stored like the tensors that are not matrices, or as factors.

    Differs from the paper:
        Not compared with the authors' code, which was not found. Defaults are ours.
        The paper has the components instead of a merged model; here there are both.
        Factors are those of the singular value decomposition, with the square roots of the singular values in both; the
        entry of largest magnitude of each left vector is positive. Factors of trained adapters would be in unrelated
        bases.
    """
    return base + lambda_ * (weighted_sum(deltas(base, models), weight) / weight.sum())
