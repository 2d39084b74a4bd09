"""Iso-C: the sum of the task vectors, with its singular values replaced by their mean."""

from typing import Literal

from torch import Tensor

from ..method import Embeddings, Others, PerModel, Scale, Weight, default, merge_method
from ..ops.linalg.rounding import deltas_above_rounding
from ..ops.linalg.spectral import RankTolerance, nuclear_norm, polar
from ..ops.sum import weighted_sum


@merge_method(
    family="spectral",
    cite="marczak2025iso",
    scope="matrix",
    version=3,
    breaks={"identical": "singular values are made equal, and task vectors are added, not averaged"},
)
def iso_c(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    divisor: Literal["rank", "size"] = "rank",
    rank_tolerance: RankTolerance = default(0.0),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Add the task vectors and replace the singular values of their sum by their mean.

        sum_i weight_i * delta_i = U diag(s) V^T,   delta_i = model_i - base
        merged = base + lambda * mean(s) * U V^T

    Use when:
        Several full fine-tunes on different tasks are merged, and directions that few of them use should count as much
        as those that all share.

    Args:
        weight: Factor of each task vector.
        lambda_: Factor of the merged task vector; the authors choose among 0.1, 0.2, ..., 3.0 on validation data.
        divisor: What the sum of the singular values is divided by: the rank, or min(rows, columns), as published.
            These are the same unless task vectors are of low rank, as those of adapters are.
        rank_tolerance: Singular values of the sum up to this share of the largest count as zero; 0: what rounding of
            the stored weights can make, in each task vector.

    Differs from the paper:
        Directions that contain only rounding errors, of a task vector or of the sum, stay zero, and the mean is
        over the others. Published code gives them arbitrary vectors of full length, and takes the mean over all. A
        frozen matrix stays as it is.
        The paper has no weights; 1 gives its formula.
        Embeddings and head are averaged unless `embeddings: matrix` says otherwise.
    """
    tolerance = float(rank_tolerance)
    total = weighted_sum(deltas_above_rounding(base, models, rounding, unless=tolerance), weight)
    factor, rank = polar(total, tolerance=tolerance)
    count = min(total.shape) if divisor == "size" else rank
    mean = nuclear_norm(factor, total) / max(count, 1)
    return factor.mul_(lambda_ * mean).add_(base)
