"""TALL masks: the sum of the task vectors, and for each task a mask of what is its own."""

import torch
from torch import Tensor

from ..method import Encoded, Lossless, Part, PerModel, Positive, Sidecar, default, merge_method
from ..ops import deltas, pack_flags, tall_mask, unpack_flags
from ..ops.bits import packed
from .consensus import MaskLambda


def parts(shape: tuple[int, ...]) -> dict[str, Part]:
    """Return what a task keeps: a bit for each element."""
    return {"mask": packed(shape[0])}


def total(base: Tensor, merged: Tensor, lambda_: Tensor) -> Tensor:
    """Return the sum of the task vectors, as the merged model has it."""
    return (merged - base) / lambda_


def encode(
    base: Tensor,
    models: list[Tensor],
    merged: Tensor,
    lambda_: Tensor,
    *,
    mask_lambda: PerModel[MaskLambda] = default(0.4),
) -> Encoded:
    """Return the mask of each task."""
    added = total(base, merged, lambda_)
    own = [tall_mask(delta, added, mask_lambda[i]) for i, delta in enumerate(deltas(base, models))]
    return {"mask": [pack_flags(mask) for mask in own]}


def decode(base: Tensor, merged: Tensor, mask: Tensor, lambda_: Tensor) -> Tensor:
    """Return the base plus what of the sum is the task's own."""
    own = unpack_flags(mask, merged.numel())
    return torch.where(own, base + total(base, merged, lambda_), base)


@merge_method(
    family="sidecars",
    cite="wang2024tall",
    breaks={"identical": "task vectors are added, not averaged"},
    sidecar=Sidecar(parts, encode, decode, lossless=Lossless(models=1)),
)
def tall_masks(base: Tensor, models: list[Tensor], *, lambda_: Positive = default(1.0)) -> Tensor:
    """Add the task vectors; a mask for each task says which elements of the sum give its model back.

        merged  = base + lambda * sum_i delta_i,   delta_i = model_i - base

    Kept for each model, a bit per element, is what gives it back:

        tau     = (merged - base) / lambda
        mask_i  = 1 where |delta_i| > mask_lambda_i * |tau - delta_i|, else 0
        model_i ~ base + mask_i * tau

    Use when:
        Many fine-tunes of one base are to be stored: one model and a bit per element for each, a sixteenth of a copy.
        To merge them into one model by the same masks, use consensus.

    Args:
        lambda_: Factor of the sum in the merged model. With 1 the sum is stored as it is; what is merged with less (0.3
            makes a useful model) has it rounded more coarsely.
        mask_lambda: What a model's own change must exceed, as a share of what the others add to it. The paper chooses
            it for each task on its validation data, from 0.2 to 0.6.

    Differs from the paper:
        The sum is that of task arithmetic; the paper also takes that of TIES.
        Masks are made from the merged model as it was written, in its dtype.
    """
    vectors = deltas(base, models)
    added = vectors[0]
    for vector in vectors[1:]:
        added = added + vector
    return base + lambda_ * added
