"""Multi-SLERP: the weighted mean direction of any number of models."""

from torch import Tensor

from ..method import PerModel, Positive, Weight, default, merge_method, statistic
from ..ops import check_total, deltas, gram, inverse_norms, unit_gram, weighted_sum

# sums of unit vectors shorter than this are rounding errors of the inner products
_CANCELLED = 1e-7


def several(weight: tuple[float, ...]) -> bool:
    """Return whether there is more than one model."""
    return len(weight) > 1


def inner_products(base: Tensor | None, models: list[Tensor]) -> Tensor:
    """Measure the inner products of the models or their task vectors, shape [T, T]."""
    return gram(models if base is None else deltas(base, models))


def factors(measured: Tensor, weight: Tensor, normalize_weights: bool, eps: Tensor) -> Tensor:
    """Return the factor of each model, shape [T]."""
    if normalize_weights:
        weight = weight / weight.sum()
    norms, cosines = unit_gram(measured)
    length = (weight @ cosines @ weight).clamp(min=0).sqrt()
    if length <= eps.clamp(min=_CANCELLED) * weight.abs().sum():
        return weight
    return (weight @ norms) / length * weight * inverse_norms(norms)


@merge_method(
    family="spherical",
    cite="-",
    models=(1, None),
    statistics={"share": statistic(inner_products, factors, when=several)},
    validate=check_total,
)
def multislerp(
    base: Tensor | None,
    models: list[Tensor],
    share: Tensor | None,
    *,
    weight: PerModel[Weight],
    normalize_weights: bool = True,
    eps: Positive = default(1e-8),
) -> Tensor:
    """Average the directions of the models, or of their task vectors, and give them their average length.

        direction = sum_i weight_i * x_i / |x_i|,   x_i = model_i, or model_i - base where a base is given
        merged    = base + sum_i weight_i |x_i| * direction / |direction|

    Use when:
        More than two models should be averaged without their norm shrinking as it does in a linear merge.

    Args:
        weight: Share of each model.
        normalize_weights: Divide the weights by their sum.
        eps: Directions cancel where |direction| is not above this share of sum_i |weight_i|; then x_i are averaged as
            they are.

    Differs from the paper:
        There is no paper; the method is from mergekit.
        mergekit computes it as a step from the mean direction along the mean of the tangents; that mean is always 0.
        mergekit refuses more than two models whose directions cancel.
        A tensor of zeros (the task vector of an unchanged tensor) is not refused, as it is by slerp: it has no direction,
        but counts in the length, as in mergekit. With two models and equal weights, the other keeps half its length.
        A single model is returned as it is, whatever its weight.
    """
    if share is None:
        return models[0].clone()
    merged = weighted_sum(models if base is None else deltas(base, models), share)
    return merged if base is None else base + merged
