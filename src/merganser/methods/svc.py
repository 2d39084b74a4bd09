"""Singular value calibration: the sum of the task vectors, shrunk in directions that several of them share."""

import torch
from torch import Tensor

from ..method import Embeddings, NonNegative, Others, PerModel, Scale, Weight, default, merge_method
from ..ops.linalg.rounding import deltas_above_rounding
from ..ops.linalg.spectral import RankTolerance, svd
from ..ops.sum import weighted_sum

_NOTHING = 1e-3
"""Responses of a task up to this share of the merged response count as 0, because rounding mixes singular vectors."""


def overcounted(delta: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """Return the factor by which the merge overshoots a task vector in each direction, shape [r], float64.

    Args:
        delta: The task vector, shape [m, n].
        left: Left singular vectors of the merged task vector, shape [m, r].
        values: Its singular values, shape [r], float64.
        right: Its right singular vectors, shape [n, r].
    """
    response = delta.T @ left
    squares = response.double().square().sum(dim=0)
    along = (response.double() * right).sum(dim=0) * values
    known = squares > (_NOTHING * values) ** 2
    return torch.where(known, along / torch.where(known, squares, 1.0), 0.0)


@merge_method(family="spectral", cite="li2026svc", scope="matrix", version=3)
def svc(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(0.3),
    alpha: NonNegative = default(0.1),
    rank_tolerance: RankTolerance = default(0.0),
    others: Others = "sum",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Add the task vectors, and shrink the directions in which the sum overshoots them.

        lambda * sum_i weight_i * delta_i = U diag(s) V^T,   delta_i = model_i - base
        a_ir   = delta_i^T u_r, the response of task i in direction r
        c_ir   = s_r * <v_r, a_ir> / |a_ir|^2, how far the merge overshoots it (1: not at all)
        merged = base + sum_r s_r / (mean_i max(c_ir, alpha)) * u_r v_r^T

    Use when:
        Task arithmetic would be used, but the fine-tunes learned much in common, which their sum counts several times.

    Args:
        weight: Factor of each task vector in the sum.
        lambda_: Factor of the sum, before it is calibrated; without effect where all c are above alpha.
        alpha: What counts at least as overshoot, so that no task raises a direction without limit. The authors' program
            takes 0.1, their experiments one over the number of models.
        rank_tolerance: Singular values of the sum up to this share of the largest count as zero; 0: what rounding of
            the stored weights can make, in each task vector.

    Differs from the paper:
        The paper calibrates what any method merged; this is its form for task arithmetic.
        Directions of a task vector that contain only rounding errors of the stored weights are left out.
        A response of up to a thousandth of s_r counts as none, and c is 0 then; the authors compare with 1e-6, whatever
        the scale.
        The authors sum embeddings and tensors that are not matrices, as `others: sum` does.
    """
    tolerance = float(rank_tolerance)
    vectors = deltas_above_rounding(base, models, rounding, unless=tolerance)
    left, values, right = svd(weighted_sum(vectors, weight) * lambda_, tolerance=tolerance)
    total = torch.zeros_like(values)
    for vector in vectors:
        total = total + overcounted(vector, left, values, right).clamp(min=float(alpha))
    mean = total / len(models)
    calibrated = torch.where(mean > 0, values / torch.where(mean > 0, mean, 1.0), values)
    return base + (left * calibrated.to(left.dtype)) @ right.T
