"""Twin-Merging: shared knowledge in one model, exclusive knowledge of each task in low rank beside it."""

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
    """Return what a task keeps of a matrix: two factors."""
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
    """Return the factors of what each model has beyond the merged one."""
    pairs = [factor(model - merged, rank_of(merged.shape, rank)) for model in models]
    return {"left": [left for left, _ in pairs], "right": [right for _, right in pairs]}


def decode(merged: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the merged matrix plus what is the task's alone."""
    return merged + left @ right.T


@merge_method(
    family="sidecars",
    cite="lu2024twin",
    breaks={"identical": "task vectors are added, not averaged"},
    sidecar=Sidecar(
        parts, encode, decode, scope="matrix", matrices=True, lossless=Lossless({"rank": 1.0, "embeddings": "matrix"})
    ),
)
def twin(
    base: Tensor,
    models: list[Tensor],
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(0.3),
) -> Tensor:
    """Add the task vectors; what each model has beyond the result is kept beside it in low rank.

        merged  = base + lambda * sum_i weight_i * (model_i - base)

    Kept for each matrix of each model are two factors, k = floor(rank * min(rows, columns)):

        left_i right_i^T = the best approximation of rank k to (model_i - merged)
        model_i          ~ merged + left_i right_i^T

    Use when:
        The task at hand is known, and models shall come close to the fine-tuned ones for a fifth of a copy each. To
        restore them, the base is not needed.

    Args:
        weight: Factor of each task vector.
        lambda_: Factor of the sum. The paper takes 0.3 for language models, 0.29 for classifiers.
        rank: Rank that is kept, as a share of the full one; 1 keeps all.
        embeddings: Whether embeddings and head are kept like the tensors that are not matrices, or in low rank.

    Differs from the paper:
        The paper mixes the low-rank parts for each input, by a router that is trained; here a task is chosen as a whole.
        The authors leave biases out; `others` says what becomes of them.
        The factors are stored in the dtype of the model.
        For LoRA the authors truncate both factors by themselves, whose product is not the difference.
    """
    return base + lambda_ * weighted_sum(deltas(base, models), weight)
