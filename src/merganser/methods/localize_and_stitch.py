"""Localize-and-Stitch without data: keep the largest changes of each model, average them where they overlap."""

from typing import Literal

import torch
from torch import Tensor

from ..method import Fraction, PerModel, default, merge_method
from ..ops import delta_magnitudes, magnitude_cut, trim


@merge_method(
    family="task vectors",
    cite="he2024localize",
    statistics={"cut": magnitude_cut(delta_magnitudes, over="trim_over")},
    breaks={"identical": "only the largest entries are kept"},
)
def localize_and_stitch(
    base: Tensor,
    models: list[Tensor],
    cut: Tensor | None,
    *,
    density: PerModel[Fraction] = default(0.05),
    trim_over: Literal["tensor", "model"] = "tensor",
) -> Tensor:
    """Keep the largest entries of each task vector, and average them where several models have one.

        cut_i  = k-th largest |delta_i|, k = floor(density_i * size)
        mask_i = 1 where |delta_i| >= cut_i and delta_i is not 0, else 0
        merged = base + sum_i mask_i * delta_i / max(1, sum_i mask_i)

    Use when:
        Fine-tunes of different tasks changed many elements, of which each needs only a small part, and this part should
        not be diluted by the others. Only the density has to be tuned.

    Args:
        density: Share of each task vector that is kept, the largest entries. The authors keep 0.05 of language models
            and 0.1 of vision models.
        trim_over: Rank the entries inside each tensor, or over the whole model as the authors do.

    Differs from the paper:
        This is its variant without data; the other one learns the masks.
        The default trims per tensor; `trim_over: model` is the authors'.
        The authors leave embeddings, head and some norms as they are in the base; so does a density of 0 under a filter.
        Entries whose magnitude equals the cut are kept, and at least one is unless the density is 0; the authors' code
        keeps only what is larger than its cut, one entry less where no two are equal.
    """
    kept = trim(base, models, cut)
    zero = torch.zeros_like(base)
    total, count = zero, zero
    for vector in kept:
        total = total + vector
        count = count + (vector != 0)
    return base + total / count.clamp(min=1)
