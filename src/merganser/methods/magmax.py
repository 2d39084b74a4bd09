"""MagMax: for every element, the largest change that any of the models made to it."""

import torch
from torch import Tensor

from ..method import Scale, default, merge_method


@merge_method(
    family="task vectors",
    cite="marczak2024magmax",
    breaks={"identical": "the change is scaled by lambda"},
)
def magmax(base: Tensor, models: list[Tensor], *, lambda_: Scale = default(0.5)) -> Tensor:
    """Take, for every element, the largest change among the models.

        delta_i = model_i - base
        k       = argmax_i |delta_i|, for every element by itself
        merged  = base + lambda * delta_k

    Use when:
        Models were trained one after the other, each from the one before, and the base is that of the first: the case
        that the authors made it for. Of models trained side by side it keeps the largest change, even against the others.

    Args:
        lambda_: Factor of the change that is taken. The authors' script for eight models trained side by side takes 0.5;
            1 gives the largest changes in full.

    Differs from the paper:
        The formula and the default were compared with FusionBench's code and what it says of the authors' script.
        Of changes of equal magnitude and other signs the positive one is taken, so that the order of the models does not
        matter; the authors' code takes that of the later model.
    """
    # in float64, since rounding must not decide between changes of other signs
    best, *rest = (model.double() - base.double() for model in models)
    for delta in rest:
        size, largest = delta.abs(), best.abs()
        # the positive one of two equal magnitudes
        best = torch.where(size > largest, delta, torch.where((size == largest) & (delta > best), delta, best))
    return base + lambda_ * best.to(base.dtype)
