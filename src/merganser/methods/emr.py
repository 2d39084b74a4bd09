"""EMR: elect a unified task vector, and restore each model from it by a mask and a factor."""

from typing import Literal

import torch
from torch import Tensor

from ..method import Encoded, Lossless, Part, Sidecar, merge_method, statistic
from ..ops import deltas, elect_largest, pack_flags, unpack_flags
from ..ops.bits import packed


def agrees(delta: Tensor, unified: Tensor) -> Tensor:
    """Return where a task vector has the sign of the unified one, bool; never where one of them is 0."""
    return ((delta > 0) & (unified > 0)) | ((delta < 0) & (unified < 0))


def magnitudes(base: Tensor, models: list[Tensor], merged: Tensor, size: int, rescale_by: str) -> Tensor:
    """Measure the L1 norms of the task vectors, and of the unified one under their masks, shape [2, T], float64."""
    unified = merged - base
    own, kept = [], []
    for delta in deltas(base, models):
        own.append(delta.double().abs().sum())
        kept.append(torch.where(agrees(delta, unified), unified, 0.0).double().abs().sum())
    sums = torch.stack(own + kept).view(2, -1)
    return sums / size if rescale_by == "mean" else sums


def factors(measured: Tensor) -> Tensor:
    """Return the factor of each task, shape [T]; 1 where the unified task vector is 0 under the mask."""
    own, kept = measured
    return torch.where(kept > 0, own / kept, 1.0)


def over_model(rescale_over: str) -> bool:
    """Return whether there is one factor per model, instead of one per tensor."""
    return rescale_over == "model"


def parts(shape: tuple[int, ...]) -> dict[str, Part]:
    """Declare what is stored for a task: one bit per element."""
    return {"mask": packed(shape[0])}


def encode(
    base: Tensor,
    models: list[Tensor],
    merged: Tensor,
    *,
    rescale_over: Literal["model", "tensor"] = "model",
    rescale_by: Literal["sum", "mean"] = "sum",
) -> Encoded:
    """Return the mask of each task."""
    return {"mask": [pack_flags(agrees(delta, merged - base)) for delta in deltas(base, models)]}


def decode(base: Tensor, merged: Tensor, mask: Tensor, factor: Tensor) -> Tensor:
    """Return the base plus the unified task vector under the task's mask, times its factor."""
    flags = unpack_flags(mask, merged.numel())
    return base + factor * torch.where(flags, merged - base, 0.0)


@merge_method(
    family="sidecars",
    cite="huang2024emr",
    when={"rescale_by": over_model},
    sidecar=Sidecar(
        parts,
        encode,
        decode,
        statistics={"factor": statistic(magnitudes, factors, over="rescale_over")},
        lossless=Lossless(models=1),
    ),
)
def emr(base: Tensor, models: list[Tensor]) -> Tensor:
    """Elect the sign of the sum of the task vectors, and the largest entry that has it.

        sign     = + where sum_i delta_i > 0, else -
        merged   = base + sign * max_i |delta_i| over the models whose delta_i has that sign

    Each model can be restored from one bit per element and one factor, which are stored for it:

        mask_i   = 1 where delta_i has the sign of (merged - base), else 0
        factor_i = sum |delta_i| / sum |mask_i * (merged - base)|, over all tensors
        model_i  ~ base + factor_i * mask_i * (merged - base)

    Use when:
        Several fine-tunes should be stored as one model from which each can be restored approximately, for a sixteenth
        of a copy each. The paper does not evaluate the merged model without its masks.

    Args:
        rescale_over: Whether a model has one factor, as in the paper, or one factor per tensor, which is more accurate.
        rescale_by: The factor is a ratio of L1 norms summed over the model, as in the paper, or of means of |delta|
            summed over tensors, as in the authors' code for language models, where a norm layer counts as much as a
            matrix.

    Differs from the paper:
        The sum is computed in float64, so that rounding does not decide the sign.
        Masks and factors are computed from the merged model as it was written, in its dtype.
        All tensors are included; the authors leave out classifiers.
    """
    return base + elect_largest(deltas(base, models))
