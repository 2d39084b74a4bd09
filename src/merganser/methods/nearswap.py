"""NearSwap: move each weight towards the other model, by at most t."""

from typing import Annotated

from torch import Tensor

from ..method import Number, merge_method

Step = Annotated[Tensor, Number(0.0, search=(1e-5, 1e-3))]


@merge_method(family="task vectors", cite="-", models=(1, 1))
def nearswap(base: Tensor, models: list[Tensor], *, t: Step) -> Tensor:
    """Take the other model's weight where it is within t of the base's, and move by t towards it elsewhere.

        delta  = model - base
        merged = base + clip(delta, -t, t)

    Use when:
        The base should become a little like another model, without a large change of any weight.

    Args:
        t: Largest change of a weight; around 1e-4.

    Differs from the paper:
        There is no paper; the method is by the Hugging Face user alchemonaut and came with mergekit.
        mergekit writes it as (1 - w) * base + w * model, w = clip(t / |delta|, 0, 1), which is equal mathematically.
        mergekit raises |delta| to at least 1e-6, so that for t below 1e-6 it moves less far.
    """
    return base + (models[0] - base).clamp(-t, t)
