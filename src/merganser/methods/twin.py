"""Twin-Merging: shared knowledge in one model, and the exclusive knowledge of each task in low-rank factors."""

from torch import Tensor

from ..method import (
    Embeddings,
    Encoded,
    Fraction,
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
from ..ops import deltas, factor, rank_of, weighted_sum


def parts(shape: tuple[int, ...], rank: Tensor) -> dict[str, Part]:
    """Declare what is stored for a task and a matrix: two low-rank factors."""
    k = rank_of(shape, rank)
    return {"left": Part((shape[0], k)), "right": Part((shape[1], k))}


def encode(
    models: list[Tensor],
    merged: Tensor,
    *,
    rank: Fraction = default(0.1),
    others: Kept = "own",
    embeddings: Embeddings = "others",
) -> Encoded:
    """Return low-rank factors of the difference between each model and the merged one."""
    pairs = [factor(model - merged, rank_of(merged.shape, rank)) for model in models]
    return {"left": [left for left, _ in pairs], "right": [right for _, right in pairs]}


def decode(merged: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the merged matrix plus the task's low-rank difference."""
    return merged + left @ right.T


def factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of the task's difference from the merged matrix, shapes [rows, k] and [k, columns]."""
    return left, right.T


@merge_method(
    family="sidecars",
    cite="lu2024twin",
    breaks={"identical": "task vectors are added, not averaged"},
    sidecar=Sidecar(
        parts,
        encode,
        decode,
        scope="matrix",
        matrices=True,
        lossless=Lossless({"rank": 1.0, "embeddings": "matrix"}),
        factors=factors,
    ),
)
def twin(
    base: Tensor,
    models: list[Tensor],
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(0.3),
) -> Tensor:
    """Add the task vectors, and store for each model a low-rank approximation of its difference from the result.

        merged  = base + lambda * sum_i weight_i * (model_i - base)

    For each matrix of each model two factors are stored, with k = floor(rank * min(rows, columns)):

        left_i right_i^T = the best approximation of rank k to (model_i - merged)
        model_i          ~ merged + left_i right_i^T

    Use when:
        The task is known at run time, and models close to the fine-tuned ones should be restored, each from a fifth of
        the size of a copy. Restoring does not need the base.

    Args:
        weight: Factor of each task vector.
        lambda_: Factor of the sum. The paper takes 0.3 for language models, 0.29 for classifiers.
        rank: Stored rank, as a share of the full one; 1 stores everything.
        embeddings: Whether embeddings and head are stored like the tensors that are not matrices, or as factors.

    Differs from the paper:
        The paper mixes the low-rank parts for each input, by a trained router; here a whole task is chosen.
        The authors leave biases out; here `others` decides about them.
        The factors are stored in the dtype of the model.
        For LoRA the authors truncate each of the two factors separately; their product is not the difference.
    """
    return base + lambda_ * weighted_sum(deltas(base, models), weight)
