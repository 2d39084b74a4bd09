"""NearSwap: towards the other model, by at most t."""

from typing import Annotated

from torch import Tensor

from ..method import Number, merge_method

Step = Annotated[Tensor, Number(0.0, search=(1e-5, 1e-3))]


@merge_method(family="task vectors", cite="-", models=(1, 1))
def nearswap(base: Tensor, models: list[Tensor], *, t: Step) -> Tensor:
    """Take the other model's weight where it is near the base's, and go t towards it elsewhere.

        delta  = model - base
        merged = base + clip(delta, -t, t)

    Use when:
        The base is to take on a little of another model without moving far anywhere.

    Args:
        t: Largest change of a weight; around 1e-4.

    Differs from the paper:
        There is no paper; the method is by the Hugging Face user alchemonaut and came with mergekit.
        It is stated there as (1 - w) * base + w * model, w = clip(t / |delta|, 0, 1): the same by arithmetic.
        mergekit takes |delta| as at least 1e-6, so that for t below 1e-6 it goes less far.
    """
    return base + (models[0] - base).clamp(-t, t)
