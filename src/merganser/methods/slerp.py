"""SLERP: interpolate along the arc between two models."""

from torch import Tensor

from ..method import Fraction, merge_method, statistic
from ..ops import along, arc, check_directions, gram, unit_gram

_PARALLEL = 0.9995


def inner_products(base: Tensor, models: list[Tensor]) -> Tensor:
    """Measure the inner products, shape [2, 2]."""
    return gram([base, *models])


def on_arc(measured: Tensor, t: Tensor) -> Tensor:
    """Solve for the factors of `along`, shape [3]."""
    norms, cosines = unit_gram(measured)
    if 0 < t < 1:
        check_directions(norms, ("the base", "the model"))
    return arc(cosines[0, 1], t, straight=cosines[0, 1].abs() > _PARALLEL)


@merge_method(
    family="spherical",
    cite="shoemake1985slerp",
    models=(1, 1),
    statistics={"factors": statistic(inner_products, on_arc)},
    breaks={"order": "the base is the start of the arc"},
)
def slerp(base: Tensor, models: list[Tensor], factors: Tensor, *, t: Fraction) -> Tensor:
    """Interpolate along the great circle between two models, tensor by tensor.

        angle  = arccos(<base, model> / (|base| |model|))
        merged = sin((1 - t) angle) / sin(angle) * base + sin(t angle) / sin(angle) * model

    Use when:
        Two models are merged, and the norm of the weights should not shrink as it does in an average.

    Args:
        t: Position on the arc: 0 is the base, 1 the model.

    Differs from the paper:
        Each tensor is one vector, interpolated along one arc; the vectors keep their own lengths.
        A tensor of zeros has no direction: it is refused unless both are zero or t is 0 or 1.
        If |cos(angle)| is above 0.9995, the models are interpolated linearly, as in most tensors of close fine-tunes.
    """
    return along(base, models[0], factors)
