"""Iso-CTS: directions common to the task vectors, and some specific to each task, with equal singular values."""

from typing import Literal

import torch
from torch import Tensor

from ..method import Embeddings, Fraction, Others, PerModel, Scale, Weight, default, merge_method
from ..ops.linalg.rounding import deltas_above_rounding
from ..ops.linalg.spectral import RankTolerance, Svd, orthogonalised, svd
from ..ops.sum import weighted_sum

# share of a task vector's norm up to which its part outside the common directions is only rounding error
_NOTHING = 2.0**-20


def common_rank(size: int, n_models: int, common_space_fraction: float) -> tuple[int, int]:
    """Return the number of common directions, and the number of specific directions of each model.

    Args:
        size: The smaller side of the matrix.
        n_models: Number of models.
        common_space_fraction: Share of common directions; the others are divided evenly among the models.
    """
    left = size - int(size * common_space_fraction)
    per_model = min(round(left / n_models), size // n_models)
    return size - per_model * n_models, per_model


def own_directions(vectors: list[Tensor], weight: Tensor, common: Tensor, k: int) -> list[Svd]:
    """Return the leading singular triplets of every task vector outside the common left directions.

    Args:
        vectors: The task vectors, shape [m, n].
        weight: Factor of each task vector, shape [T].
        common: Shape [m, c], orthonormal columns.
        k: Largest number of triplets of each task vector.
    """
    m, n = vectors[0].shape
    # decompose in coordinates of the complement, where the matrix is small, unless it is much taller than wide
    complement = torch.linalg.qr(common, mode="complete").Q[:, common.shape[1] :] if m - common.shape[1] < n else None
    directions = []
    for i, vector in enumerate(vectors):
        delta = vector * weight[i]
        noise = _NOTHING * torch.linalg.vector_norm(delta.double())
        if complement is None:
            part = svd(delta - common @ (common.T @ delta), k)
        else:
            part = svd(complement.T @ delta, k)
            part = part._replace(left=complement @ part.left)
        rank = int((part.values > noise).sum())
        directions.append(Svd(part.left[:, :rank], part.values[:rank], part.right[:, :rank]))
    return directions


@merge_method(
    family="spectral",
    cite="marczak2025iso",
    scope="matrix",
    version=3,
    breaks={"identical": "singular values are made equal, and task vectors are added, not averaged"},
)
def iso_cts(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    common_space_fraction: Fraction = default(0.8),
    divisor: Literal["rank", "size"] = "rank",
    rank_tolerance: RankTolerance = default(0.0),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Combine directions common to the task vectors with some specific to each, and equalise their singular values.

        common: the c leading triplets U, s, V of sum_i weight_i * delta_i,   delta_i = model_i - base
        own:    the q leading triplets U_i, s_i, V_i of weight_i * delta_i - U U^T weight_i * delta_i
        merged = base + lambda * mean(s_1, ..., s_T, s) * polar([U_1 ... U_T U]) polar([V_1 ... V_T V])^T

    With r = min(rows, columns), q is (r - floor(r * common_space_fraction)) / T, rounded, and c = r - T * q. polar
    gives the nearest matrix with orthonormal columns.

    Use when:
        Many full fine-tunes on different tasks are merged, and the merge should contain both what they have in common
        and what only one of them has learned.

    Args:
        weight: Factor of each task vector.
        lambda_: Factor of the merged task vector; the authors choose among 0.1, 0.2, ..., 3.0 on validation data.
        common_space_fraction: Share of the directions that are common.
        divisor: What the sum of the singular values is divided by: their number, or min(rows, columns), as published.
            Both are equal unless task vectors have low rank, as those of adapters do.
        rank_tolerance: Singular values of the sum up to this share of the largest count as zero; 0: values that
            rounding of the stored weights can cause, in each task vector.

    Differs from the paper:
        Triplets that may be rounding error alone are left out (of the stored weights, in each task vector; up to 2^-22
        of the largest value of the sum, or 2^-20 of the task vector's norm), and the mean is over the others.
        Published code gives them arbitrary vectors of full length, and takes the mean over all.
        If vectors of different models span the same directions (to 1e-5), the polar factor omits the undetermined part.
        With many models and few rows or columns, the published rounding of q needs more directions than exist, and the
        published code fails; here q is at most floor(r / T).
        The paper has no weights; 1 gives its formula.
        Embeddings and head are averaged unless `embeddings: matrix` says otherwise.
    """
    size = min(base.shape)
    n_common, n_own = common_rank(size, len(models), float(common_space_fraction))
    tolerance = float(rank_tolerance)
    vectors = deltas_above_rounding(base, models, rounding, unless=tolerance)
    common = svd(weighted_sum(vectors, weight), n_common, tolerance=tolerance)
    own = own_directions(vectors, weight, common.left, n_own)
    values = torch.cat([part.values for part in own] + [common.values])
    # the two groups of left vectors are already orthogonal to each other
    left = torch.cat([orthogonalised([part.left for part in own]), common.left], dim=1)
    right = orthogonalised([*(part.right for part in own), common.right])
    mean = values.sum() / max(size if divisor == "size" else len(values), 1)
    return base + (left * (lambda_ * mean)) @ right.T
