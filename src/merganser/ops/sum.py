"""Task vectors, weighted sums and norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_NO_WEIGHT = 1e-8
"""Share of their magnitudes up to which the sum of weights is rounding."""

_SMALLEST = torch.finfo(torch.float32).tiny
"""Below it float32 loses digits, and then is 0."""

_NO_MASS = 1e-7


def deltas(base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
    """Return the task vectors, model minus base."""
    return [model - base for model in models]


def squared_norms(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """Measure the squared norms of the task vectors, shape [T], float64."""
    return torch.stack([vector.double().square().sum() for vector in deltas(base, models)])


def weighted_sum(tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Return `sum_i weight[i] * tensors[i]`, added in order.

    Args:
        tensors: At least one tensor.
        weight: One entry per tensor, shape [T].
    """
    total = tensors[0] * weight[0]
    for i in range(1, len(tensors)):
        total = total + tensors[i] * weight[i]
    return total


def check_total(parameters: Mapping[str, Any]) -> str | None:
    """Return what is wrong if a method divides by the sum of its weights, and these add up to 0; else None.

    Args:
        parameters: Parameters by their names in recipes: `weight`, and `normalize` or `normalize_weights`, whichever the
            method has, which tells whether it divides.
    """
    if not parameters.get("normalize", parameters.get("normalize_weights", True)):
        return None
    weight = parameters["weight"]
    if abs(math.fsum(weight)) > max(_SMALLEST, _NO_WEIGHT * math.fsum(map(abs, weight))):
        return None
    switch = next((f"; or set {name}: false" for name in parameters if name.startswith("normalize")), "")
    return (
        f"the weights add up to 0, so they cannot be normalised, got {', '.join(f'{w:g}' for w in weight)}; "
        f"give weights with another sum (in each layer, where they follow a schedule){switch}"
    )


def l1_norms(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Measure the L1 norms of tensors before and after an operation, shape [2, T], float64."""
    return torch.stack([tensor.double().abs().sum() for tensor in (*before, *after)]).view(2, -1)


def l1_gain(measured: Tensor) -> Tensor:
    """Return the factors that restore the norms measured by `l1_norms`, shape [T]; 1 where a norm is below 1e-7."""
    before, after = measured
    return torch.where((before < _NO_MASS) | (after < _NO_MASS), 1.0, before / after)


def scaled(tensors: Sequence[Tensor], factor: Tensor | None) -> list[Tensor]:
    """Return `tensors[i] * factor[i]`, or the tensors themselves if the factor is None."""
    return list(tensors) if factor is None else [tensor * factor[i] for i, tensor in enumerate(tensors)]


def round_down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest number of a dtype that is at most `value`, a float64 tensor.

    For x of that dtype: x > result exactly where x > value.
    """
    rounded = value.to(dtype)
    return torch.where(rounded > value, torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)), rounded)


def not_negative(value: Tensor) -> Tensor:
    """Return where float64 values are at least 0; values smaller than 2**-1050 in magnitude count as 0.

    Compares in float32, because fused kernels convert masks of float64 to masks of float32 one element at a time. The
    factor keeps small values from becoming 0; large values may become infinite, which does not change their sign.
    """
    return (value * 2.0**900).float() >= 0
