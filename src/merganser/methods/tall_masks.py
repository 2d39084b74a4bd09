"""TALL masks: the sum of the task vectors, and for each task a mask of the elements that matter to it."""

import torch
from torch import Tensor

from ..method import Encoded, Lossless, Part, PerModel, Positive, Sidecar, default, merge_method
from ..ops import deltas, pack_flags, tall_mask, unpack_flags
from ..ops.bits import packed
from .consensus import MaskLambda


def parts(shape: tuple[int, ...]) -> dict[str, Part]:
    """Declare what is stored for a task: one bit per element."""
    return {"mask": packed(shape[0])}


def total(base: Tensor, merged: Tensor, lambda_: Tensor) -> Tensor:
    """Return the sum of the task vectors, recovered from the merged model."""
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
    masks = [tall_mask(delta, added, mask_lambda[i]) for i, delta in enumerate(deltas(base, models))]
    return {"mask": [pack_flags(mask) for mask in masks]}


def decode(base: Tensor, merged: Tensor, mask: Tensor, lambda_: Tensor) -> Tensor:
    """Return the base plus the sum of the task vectors where the task's mask is set."""
    flags = unpack_flags(mask, merged.numel())
    return torch.where(flags, base + total(base, merged, lambda_), base)


@merge_method(
    family="sidecars",
    cite="wang2024tall",
    breaks={"identical": "task vectors are added, not averaged"},
    sidecar=Sidecar(parts, encode, decode, lossless=Lossless(models=1)),
)
def tall_masks(base: Tensor, models: list[Tensor], *, lambda_: Positive = default(1.0)) -> Tensor:
    """Add the task vectors, and store for each task a mask of the elements of the sum that restore its model.

        merged  = base + lambda * sum_i delta_i,   delta_i = model_i - base

    Each model can be restored from one bit per element, which is stored for it:

        tau     = (merged - base) / lambda
        mask_i  = 1 where |delta_i| > mask_lambda_i * |tau - delta_i|, else 0
        model_i ~ base + mask_i * tau

    Use when:
        Many fine-tunes of one base should be stored: one model, and one bit per element for each fine-tune, a sixteenth
        of a copy. To merge them into one model by the same masks, use consensus.

    Args:
        lambda_: Factor of the sum in the merged model. With 1 the sum is stored as it is; with less (0.3 makes the
            merged model useful) the restored sum has a larger rounding error.
        mask_lambda: An element matters to a model if its change exceeds this share of the sum of the other models'
            changes. The paper chooses it for each task on its validation data, from 0.2 to 0.6.

    Differs from the paper:
        The sum is that of task arithmetic; the paper also uses that of TIES.
        Masks are computed from the merged model as it was written, in its dtype.
    """
    vectors = deltas(base, models)
    added = vectors[0]
    for vector in vectors[1:]:
        added = added + vector
    return base + lambda_ * added
