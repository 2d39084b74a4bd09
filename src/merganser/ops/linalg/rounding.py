"""Rounding error in task vectors, caused by storing models: spectral methods must not mistake it for a signal.

A weight x stored with p bits has an error of up to half a unit in the last place, ulp(x) = 2^(floor(log2 |x|) + 1 - p),
with variance ulp(x)^2 / 12. So the noise in a task vector scales with the weights, not with the task vector: of small
changes stored as bfloat16 it is a third. The errors of entries are independent, and such a matrix N, with
variances v, has

    |N|_2 <= sqrt(max_i sum_j v_ij) + sqrt(max_j sum_i v_ij)

up to a few percent (Bandeira and van Handel, 2016). For equal variances this is sigma * (sqrt(rows) + sqrt(columns)).
Singular values of a task vector above this bound are signal; those below it cannot be distinguished from noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..sum import deltas
from .spectral import Svd, svd

_EXPONENT = 0x7FF << 52
_GRIDS = (torch.bfloat16, torch.float16, torch.float32)


def grid(stored: Tensor) -> torch.dtype:
    """Return the narrowest float dtype that holds all the values: the one in which they were last rounded.

    Checkpoints of bfloat16 are often saved as float32, which does not undo the rounding.
    """
    return next(
        (dtype for dtype in _narrower(stored.dtype) if torch.equal(_rounded(stored, dtype), stored)), stored.dtype
    )


def rounding_variance(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the variance of the error of rounding each value to a dtype, ulp^2 / 12; 0 for zeros; float64.

    Args:
        stored: Values that the dtype holds, any float dtype and shape.
        dtype: From `grid`.
    """
    limits = torch.finfo(dtype)
    wide = stored.double()
    # the exponent's bits alone are the power of two at or below |x|; infinite where x is, or NaN
    power = (wide.view(torch.int64) & _EXPONENT).view(torch.float64)
    ulp = torch.where(power < torch.inf, power, 0.5).mul_(limits.eps)
    return torch.where(wide != 0, ulp.clamp_(min=limits.tiny * limits.eps).square_() / 12, 0.0)


def rounding_norms(stored: Tensor) -> Tensor:
    """Return the expected norm of the rounding error of each row, shape [k], float64.

    Args:
        stored: Shape [k, n]; the grid of each row is found separately.
    """
    if stored.dtype.itemsize == 2 and stored.device.type == "cpu":
        # such a dtype has no narrower one here, and so few values that their variances are looked up
        patterns = stored.view(torch.int16) & 0x7FFF
        return _variances(stored.dtype)[patterns.long()].sum(1).sqrt()
    norms = stored.new_zeros(len(stored), dtype=torch.float64)
    left = torch.ones_like(norms, dtype=torch.bool)
    for dtype in _narrower(stored.dtype):
        exact = left & (_rounded(stored, dtype) == stored).all(1)
        if exact.any():
            norms[exact] = rounding_variance(stored[exact], dtype).sum(1).sqrt()
            left &= ~exact
    return norms


@cache
def _variances(dtype: torch.dtype) -> Tensor:
    """Return `rounding_variance` of all values of a 16-bit dtype without a sign, by their bit patterns, shape [32768]."""
    return rounding_variance(torch.arange(1 << 15, dtype=torch.int16).view(dtype), dtype)


def largest_rounding(stored: Tensor) -> Tensor:
    """Return a bound of the largest singular value of the rounding error in a task vector, 0-d, float64.

    Twice the variance is taken, since the base may have been rounded in the same way.

    Args:
        stored: A model's matrix as stored in the checkpoint, shape [m, n].
    """
    variance = rounding_variance(stored, grid(stored))
    if not variance.numel():
        return variance.sum()
    return (variance.sum(1).amax().sqrt() + variance.sum(0).amax().sqrt()) * 2**0.5


def above_rounding(delta: Tensor, rounding: Tensor) -> Tensor:
    """Return a task vector without the directions that may be rounding error alone.

    Args:
        delta: Shape [m, n].
        rounding: Singular values up to this are removed, 0-d.
    """
    left, values, right = svd(delta, noise=float(rounding))
    return delta if len(values) == min(delta.shape) else (left * values.to(left.dtype)) @ right.T


def deltas_above_rounding(
    base: Tensor, models: Sequence[Tensor], rounding: Tensor, *, unless: float = 0.0
) -> list[Tensor]:
    """Return the task vectors, each without the directions that may be rounding error alone.

    If that removes all of all task vectors, they are returned unchanged: no direction stands out, and otherwise the
    merge would be the base alone.

    Args:
        base: Shape [m, n].
        models: The models.
        rounding: Bound for each model, shape [T], as the engine passes it.
        unless: `rank_tolerance` of the recipe. If it is above 0, it alone decides, and nothing is removed here.
    """
    vectors = deltas(base, models)
    if unless > 0:
        return vectors
    kept = [above_rounding(vector, rounding[i]) for i, vector in enumerate(vectors)]
    return kept if any(vector.any() for vector in kept) else vectors


def triplets_above_rounding(
    base: Tensor,
    models: Sequence[Tensor],
    rounding: Tensor,
    decompose: Callable[[Tensor, float], Svd],
    *,
    unless: float = 0.0,
) -> list[Svd]:
    """Return singular triplets of the task vectors, with the cut of `deltas_above_rounding`.

    Args:
        base: Shape [m, n].
        models: The models.
        rounding: Bound for each model, shape [T], as the engine passes it.
        decompose: Called with a task vector and the singular value up to which values count as zero.
        unless: As in `deltas_above_rounding`.
    """
    cuts = [0.0] * len(models) if unless > 0 else rounding.tolist()
    decompositions = [decompose(model - base, cut) for model, cut in zip(models, cuts, strict=True)]
    if any(cuts) and not any(part.values.any() for part in decompositions):
        return [decompose(model - base, 0.0) for model in models]
    return decompositions


def _narrower(dtype: torch.dtype) -> list[torch.dtype]:
    """Return the float dtypes whose values `dtype` can represent, from the narrowest to `dtype` itself."""
    return [one for one in _GRIDS if one.itemsize < dtype.itemsize] + [dtype]


def _rounded(stored: Tensor, dtype: torch.dtype) -> Tensor:
    return stored if dtype == stored.dtype else stored.to(dtype).to(stored.dtype)
