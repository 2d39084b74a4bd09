"""Subspace boosting: the sum of the task vectors, with its small singular values raised."""

from torch import Tensor

from ..method import Embeddings, Fraction, Others, PerModel, Scale, Weight, default, merge_method
from ..ops.linalg.rounding import deltas_above_rounding
from ..ops.linalg.spectral import RankTolerance, svd
from ..ops.sum import check_total, weighted_sum


@merge_method(
    family="spectral",
    cite="skorobogat2025boosting",
    scope="matrix",
    version=3,
    breaks={"identical": "singular values are raised, and task vectors are added, not averaged"},
    validate=check_total,
)
def subspace_boosting(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    beta: Fraction = default(0.01),
    normalize: bool = True,
    rank_tolerance: RankTolerance = default(0.0),
    others: Others = "sum",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Average the task vectors, and raise the small singular values of their mean to a large one.

        sum_i weight_i * delta_i = U diag(s) V^T,   delta_i = model_i - base,   s_1 >= s_2 >= ...
                                   (over sum_i weight_i when normalize)
        k      = the first index with s_1 + ... + s_k >= beta * (sum of all s)
        merged = base + lambda * U diag(max(s, s_k)) V^T

    Use when:
        Many full fine-tunes are merged, and their common directions outweigh those of single tasks. Raising makes the
        merged task vector longer, so try lambda 0.1 to 1 and beta 0 to 0.5.
        With one model, it boosts the result of another method: as the second stage of a recipe.

    Args:
        weight: Factor of each task vector.
        lambda_: Factor of the merged task vector.
        beta: The largest singular values that make up this share of the sum of all are left as they are. 0 makes all
            equal to the largest; 1 changes nothing. At 0.01 the largest alone makes up more, so all are raised to it.
        normalize: Divide the sum by the sum of the weights, as the authors do; otherwise the merged task vector is
            longer by a factor of the number of models.
        rank_tolerance: Singular values of the sum up to this share of the largest count as zero; 0: values that
            rounding of the stored weights can cause, in each task vector.

    Differs from the paper:
        Directions that may be rounding error alone, of a task vector or of the sum, stay zero; published code raises
        arbitrary vectors in their place.
        The formula was checked against ports, not against the authors' code, which treats only attention and MLP.
    """
    tolerance = float(rank_tolerance)
    total = weighted_sum(deltas_above_rounding(base, models, rounding, unless=tolerance), weight)
    left, values, right = svd(total / weight.sum() if normalize else total, tolerance=tolerance)
    # the factor counts a share that is reached exactly as reached, in spite of rounding
    reached = values.cumsum(0) >= float(beta) * (1 - 1e-9) * values.sum()
    raised = values.clamp(min=values[reached].amax()) if len(values) else values
    return base + (left * (lambda_ * raised).to(left.dtype)) @ right.T
