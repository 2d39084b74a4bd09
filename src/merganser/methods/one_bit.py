"""1-bit task vectors: the sign of each element, and one scale."""

from typing import Literal

import torch
from torch import Tensor

from ..method import Embeddings, Encoded, Kept, Part, PerModel, Scale, Sidecar, Weight, default, merge_method, statistic
from ..ops import check_total, deltas, pack_flags, unpack_flags, weighted_sum
from ..ops.bits import packed


def from_base(origin: str) -> bool:
    """Return whether restoring needs the base."""
    return origin == "base"


def scales_tensor(scale_per: str) -> bool:
    """Return whether there is one scale per tensor, instead of one per row."""
    return scale_per == "tensor"


def changes(base: Tensor, models: list[Tensor], merged: Tensor, origin: str) -> list[Tensor]:
    """Return the differences that are compressed: models minus base, or models minus the merged model."""
    return deltas(base if from_base(origin) else merged, models)


def magnitudes(base: Tensor, models: list[Tensor], merged: Tensor, origin: str) -> Tensor:
    """Measure the sums of magnitudes, shape [T], float64."""
    return torch.stack([delta.double().abs().sum() for delta in changes(base, models, merged, origin)])


def mean_magnitude(measured: Tensor, size: Tensor) -> Tensor:
    """Return the scale of each task, shape [T]."""
    return measured / size.clamp(min=1)


def parts(shape: tuple[int, ...], scale_per: str) -> dict[str, Part]:
    """Declare what is stored for a task: one bit per element, and scales of the rows if there are any."""
    declared = {"sign": packed(shape[0] * shape[1])}
    return declared if scales_tensor(scale_per) else {**declared, "scale": Part(shape[:1], "float32")}


def encode(
    base: Tensor,
    models: list[Tensor],
    merged: Tensor,
    *,
    origin: Literal["base", "merged"] = "base",
    scale_per: Literal["tensor", "row"] = "tensor",
    others: Kept = "own",
    embeddings: Embeddings = "others",
) -> Encoded:
    """Return signs, and scales of the rows, which are stored only if `parts` declares them."""
    vectors = changes(base, models, merged, origin)
    signs = [pack_flags(vector >= 0) for vector in vectors]
    return {"sign": signs, "scale": [vector.double().abs().mean(dim=1) for vector in vectors]}


def decode(base: Tensor | None, merged: Tensor, sign: Tensor, scale: Tensor, origin: str) -> Tensor:
    """Return the origin plus or minus the scale, by the sign of each element."""
    start = merged if base is None or not from_base(origin) else base
    positive = unpack_flags(sign, merged.numel()).reshape(merged.shape)
    step = scale.reshape(-1, 1)
    return start + torch.where(positive, step, -step)


@merge_method(
    family="sidecars",
    cite="liu2025onebit",
    validate=check_total,
    sidecar=Sidecar(
        parts,
        encode,
        decode,
        scope="row",
        statistics={"scale": statistic(magnitudes, mean_magnitude, when=scales_tensor)},
        base=from_base,
        matrices=True,
    ),
)
def one_bit(
    base: Tensor, models: list[Tensor], *, weight: PerModel[Weight] = default(1.0), lambda_: Scale = default(1.0)
) -> Tensor:
    """Average the task vectors, and store each of them as signs and a scale.

        merged  = base + lambda * sum_i weight_i * delta_i / sum_i weight_i,   delta_i = model_i - base

    Each matrix of each model can be restored from one bit per element and one number, which are stored for it:

        scale_i = mean |delta_i|
        model_i ~ base + scale_i * sign(delta_i),   sign(0) = 1

    Use when:
        Many fine-tunes should be served from one base in memory, and each may cost a sixteenth of it.

    Args:
        weight: Share of each task vector in the merged model; restoring does not depend on it.
        lambda_: Factor of the average; restoring does not depend on it.
        origin: What is subtracted from the models: the base, as in the paper, or the merged model, which is closer
            where the models agree; then restoring does not need the base.
        scale_per: Whether there is one scale per matrix, or one per row, which costs little and is more accurate.
        embeddings: Whether embeddings and head are stored like the tensors that are not matrices, or as signs.

    Differs from the paper:
        Not compared with the authors' code, which was not found; the scale is the one that is optimal for the norm.
        The paper compresses, for each expert, either the attention or the feed-forward matrices; here all are.
        It routes each input to an expert, and merges the others into the base; here a whole task is chosen.
    """
    return base + lambda_ * (weighted_sum(deltas(base, models), weight) / weight.sum())
