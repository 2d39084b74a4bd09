"""TSV-M: the leading singular vectors of all task vectors, orthogonalised, with their singular values."""

from torch import Tensor

from ..method import Embeddings, Others, PerModel, Scale, Weight, default, merge_method
from ..ops.linalg.rounding import triplets_above_rounding
from ..ops.linalg.spectral import RankTolerance, Svd, joined, svd


@merge_method(
    family="spectral",
    cite="gargiulo2025tsv",
    scope="matrix",
    version=3,
    breaks={"identical": "only a share of the singular vectors of each model is kept"},
)
def tsv_m(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    rank_tolerance: RankTolerance = default(0.0),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Keep the leading singular triplets of every task vector, make all their vectors orthogonal, and add them up.

        delta_i ~ U_i S_i V_i^T, its k = floor(min(rows, columns) / T) leading triplets,   delta_i = model_i - base
        U = polar([U_1 ... U_T]),   V = polar([V_1 ... V_T]),   S = diag(weight_1 S_1, ..., weight_T S_T)
        merged = base + lambda * U S V^T

    polar gives the nearest matrix with orthonormal columns.

    Use when:
        Several full fine-tunes on clearly different tasks are merged, and their leading directions overlap.

    Args:
        weight: Factor of each task vector.
        lambda_: Factor of the merged task vector; the authors take 1, or choose among 0.1, 0.2, ..., 3.0.
        rank_tolerance: Singular values up to this share of the largest of a task vector count as zero; 0: what
            rounding of the stored weights can make.

    Differs from the paper:
        Triplets that contain only rounding errors are left out: nothing is added in the null space of the task
        vectors. Published code keeps their arbitrary vectors; weighted by zero, they still tilt those of the others.
        Where vectors of different models span the same directions (to 1e-5), as those of equal models do, the polar
        factor leaves out what is undetermined, instead of adding arbitrary directions: equal models give the k
        leading triplets of one.
        At least one triplet of each model is kept; published code keeps none with more models than rows or columns.
        The paper has no weights; 1 gives its formula.
        Embeddings and head are averaged unless `embeddings: matrix` says otherwise.
    """
    k = max(min(base.shape) // len(models), 1)
    tolerance = float(rank_tolerance)

    def decompose(delta: Tensor) -> Svd:
        return svd(delta, k, tolerance=tolerance)

    parts = triplets_above_rounding(base, models, rounding, decompose, unless=tolerance)
    return base + lambda_ * joined(
        [part._replace(values=part.values * w) for part, w in zip(parts, weight, strict=True)]
    )
