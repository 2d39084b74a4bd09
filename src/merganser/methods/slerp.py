"""SLERP: along the arc between two models."""

import torch
from torch import Tensor

from ..method import Fraction, merge_method, statistic
from ..ops import gram, unit_gram

_PARALLEL = 0.9995


def inner_products(base: Tensor, models: list[Tensor]) -> Tensor:
    """Measure the inner products, shape [2, 2]."""
    return gram([base, *models])


def coefficients(measured: Tensor, t: Tensor) -> Tensor:
    """Solve for the factors of the base and of the model, shape [2]."""
    _, cosines = unit_gram(measured)
    cosine = cosines[0, 1]
    if cosine.abs() > _PARALLEL:
        return torch.stack([1 - t, t])
    angle = torch.arccos(cosine)
    return torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle)]) / torch.sin(angle)


@merge_method(
    family="spherical",
    cite="shoemake1985slerp",
    models=(1, 1),
    statistics={"share": statistic(inner_products, coefficients)},
    breaks={"order": "the base is the start of the arc"},
)
def slerp(base: Tensor, models: list[Tensor], share: Tensor, *, t: Fraction) -> Tensor:
    """Interpolate along the great circle between two models, tensor by tensor.

        angle  = arccos(<base, model> / (|base| |model|))
        merged = sin((1 - t) angle) / sin(angle) * base + sin(t angle) / sin(angle) * model

    Use when:
        Two models, and the norm of the weights should not shrink as it does in an average.

    Args:
        t: Position on the arc: 0 is the base, 1 the model.

    Differs from the paper:
        The arc is that of the whole tensor as one vector, and the vectors keep their own lengths.
        Where |cos(angle)| is above 0.9995 the straight line is taken; that is most tensors of close fine-tunes.
    """
    return base * share[0] + models[0] * share[1]
