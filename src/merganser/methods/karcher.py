"""Karcher mean: the point of the sphere with the smallest sum of squared distances to the models."""

import torch
from torch import Tensor

from ..method import Count, NonNegative, Positive, default, merge_method, statistic
from ..ops import check_directions, gram, inverse_norms, unit_gram, weighted_sum

# if the sine of the angle is below this, two vectors are opposite and no shortest arc between them is unique
_OPPOSITE = 1e-7


def tangent(direction: Tensor, cosines: Tensor, share: Tensor, tol: Tensor) -> Tensor:
    """Return the weighted mean of the tangent vectors that lead from a direction to all models.

    Args:
        direction: The direction, as factors of the unit vectors, shape [T].
        cosines: Inner products of the unit vectors, shape [T, T].
        share: Share of each model, shape [T].
        tol: Angles below this are ignored.

    Returns:
        Factors of the unit vectors, shape [T].
    """
    cosine = (cosines @ direction).clamp(-1, 1)
    angle = torch.arccos(cosine)
    sine = torch.sin(angle)
    away = (angle >= tol) & (sine > _OPPOSITE)
    pull = torch.where(away, share * angle / torch.where(away, sine, 1.0), 0.0)
    return pull - (pull @ cosine) * direction


def length(factors: Tensor, cosines: Tensor) -> Tensor:
    """Return the norm of a linear combination of the unit vectors."""
    return (factors @ cosines @ factors).clamp(min=0).sqrt()


def factors(measured: Tensor, max_iter: int, tol: Tensor, zero_norm: Tensor) -> Tensor:
    """Return the factor of each model, shape [T]."""
    norms, cosines = unit_gram(measured)
    if zero_norm == 0:
        check_directions(norms)
    present = norms > zero_norm
    if not present.any():
        return torch.full_like(norms, 1 / len(norms))
    share = present.double() / present.sum()
    mean = length(share, cosines)
    direction = share / mean
    if mean < tol:
        direction = torch.zeros_like(share)
        direction[int(present.int().argmax())] = 1.0
    for _ in range(max_iter):
        step = tangent(direction, cosines, share, tol)
        size = length(step, cosines)
        if size < tol:
            break
        direction = torch.cos(size) * direction + torch.sin(size) / size * step
        direction = direction / length(direction, cosines)
    return norms.mean() * direction * inverse_norms(norms)


def inner_products(models: list[Tensor]) -> Tensor:
    """Measure the inner products, shape [T, T]."""
    return gram(models)


@merge_method(
    family="spherical",
    cite="karcher1977mean",
    statistics={"share": statistic(inner_products, factors)},
    mergekit={"zero_norm": 1e-5},
)
def karcher(
    models: list[Tensor],
    share: Tensor,
    *,
    max_iter: Count = 10,
    tol: Positive = default(1e-5),
    zero_norm: NonNegative = default(0.0),
) -> Tensor:
    """Take the mean of the models' directions on the sphere, and give it their mean length.

        direction = argmin_{|u| = 1} sum_i arccos(<u, model_i> / |model_i|)^2
        merged    = mean_i |model_i| * direction

    The fixed point of u <- exp_u(mean_i log_u(model_i / |model_i|)), starting at the normalised mean, per tensor.

    Use when:
        Several models are of equal value, and the norm of the weights should not shrink as it does in an average.

    Args:
        max_iter: Largest number of steps.
        tol: Stop when a step is shorter than this; models at a smaller angle than this are ignored in a step.
        zero_norm: Models whose norm is at most this have no direction, but count in the mean length. With 0, a model of
            zeros is refused unless all models are zeros.

    Differs from the paper:
        The paper defines the mean on any manifold; here each tensor of a model is one point on a sphere.
        Opposite models have no mean direction; the iteration then starts at the first model.
        mergekit ignores models with a norm of up to 1e-5 (`zero_norm`), and returns zeros if that leaves none.
    """
    return weighted_sum(models, share)
