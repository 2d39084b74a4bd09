"""Rounding error in task vectors, caused by storing models: spectral methods must not mistake it for a signal.

A weight x stored with p bits has an error of up to half a unit in the last place, ulp(x) = 2^(floor(log2 |x|) + 1 - p),
with variance ulp(x)^2 / 12. So the noise in a task vector scales with the weights, not with the task vector: of small
changes stored as bfloat16 it is a third. The errors of entries are independent, and such a matrix N, with
variances v, has

    |N|_2 <= sqrt(max_i sum_j v_ij) + sqrt(max_j sum_i v_ij)

up to a few percent (Bandeira and van Handel, 2016). For equal variances this is sigma * (sqrt(rows) + sqrt(columns)).
Singular values of a task vector above this bound are signal. One below it cannot be distinguished from noise, but all
together can: noise has a known norm. Of low-rank adapters that were added to their base, what is below the bound has 0.5 to
1.2 times the squared norm of noise, of full fine-tunes 1.2 to 9 times (SmolLM2-135M, 99 % of the matrices; one expert that
moved little: 0.7 to 2.6 times): their singular values fall smoothly, many small ones matter together, and are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..sum import deltas
from .spectral import Svd, has_more_below, svd

_EXPONENT = 0x7FF << 52
_EXPLAINED = 1.25**0.5
"""Directions below the bound are removed if their norm is at most this many times the expected norm of rounding."""

_CLEARLY = 1.01
"""Squared norms that differ by more than this factor differ in whatever way they are computed."""

_STRIP = 1 << 16
"""Entries whose variances are computed at a time."""

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
    if stored.dtype == dtype and dtype.itemsize == 2 and stored.device.type == "cpu":
        # there are so few such values that their variances are looked up
        patterns = (stored.view(torch.int16) & 0x7FFF).int()
        return _variances(dtype).index_select(0, patterns.reshape(-1)).view(stored.shape)
    return _computed_variance(stored, dtype)


def _computed_variance(stored: Tensor, dtype: torch.dtype) -> Tensor:
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
    if stored.dtype.itemsize == 2:
        # such a dtype has no narrower one here
        return rounding_variance(stored, stored.dtype).sum(1).sqrt()
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
    return _computed_variance(torch.arange(1 << 15, dtype=torch.int16).view(dtype), dtype)


def rounding_in(stored: Tensor) -> Tensor:
    """Return what rounding has left in a task vector: its largest singular value at most, its norm; shape [2], float64.

    Twice the variance is taken, since the base may have been rounded in the same way. For the norm of bfloat16 it is
    taken once: fine-tuning changes small directions by little more than bfloat16 rounds them, so that a larger allowance would
    remove what was learnt. The base is then taken to be exact, which it is if models were trained from it as it is stored.

    Args:
        stored: A model's matrix as stored in the checkpoint, shape [m, n].
    """
    dtype = grid(stored)
    if not stored.numel():
        return stored.new_zeros(2, dtype=torch.float64)
    m, n = stored.shape
    rows, columns = (stored.new_zeros(size, dtype=torch.float64) for size in (m, n))
    # in strips, as float64 variances of a large matrix would go through memory
    step = max(_STRIP // n, 1)
    for start in range(0, m, step):
        variance = 2 * rounding_variance(stored[start : start + step], dtype)
        rows[start : start + step] = variance.sum(1)
        columns += variance.sum(0)
    largest = rows.amax().sqrt() + columns.amax().sqrt()
    return torch.stack([largest, (rows.sum() / (2 if dtype == torch.bfloat16 else 1)).sqrt()])


def above_rounding(delta: Tensor, rounding: Tensor) -> Tensor:
    """Return a task vector without the directions that contain rounding error alone.

    Args:
        delta: Shape [m, n].
        rounding: From `rounding_in`. Singular values up to the first entry are removed, unless they are more than
            rounding explains.
    """
    largest, norm = rounding.tolist()
    explained = _most_explained(delta, norm)
    # most task vectors of full fine-tunes are clearly more than rounding, and then no singular vectors are needed
    if has_more_below(delta, largest, _CLEARLY * explained**2):
        return delta
    left, values, right = svd(delta, noise=largest)
    if len(values) == min(delta.shape):
        return delta
    kept = (left * values.to(left.dtype)) @ right.T
    # each entry of `kept` is exact to 2^-22 of the norm of the task vector
    return kept if _norm(delta - kept) <= explained else delta


def deltas_above_rounding(
    base: Tensor, models: Sequence[Tensor], rounding: Tensor, *, unless: float = 0.0
) -> list[Tensor]:
    """Return the task vectors, each without the directions that contain rounding error alone.

    If that removes all of all task vectors, they are returned unchanged: no direction stands out, and otherwise the
    merge would be the base alone.

    Args:
        base: Shape [m, n].
        models: The models.
        rounding: `rounding_in` of each model, shape [T, 2], as the engine passes it.
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
    decompose: Callable[[Tensor], Svd],
    *,
    unless: float = 0.0,
) -> list[Svd]:
    """Return singular triplets of the task vectors, with the cut of `deltas_above_rounding`.

    Args:
        base: Shape [m, n].
        models: The models.
        rounding: As in `deltas_above_rounding`.
        decompose: Returns the triplets of a task vector, the largest first.
        unless: As in `deltas_above_rounding`.
    """
    cut = [] if unless > 0 else [_triplets(model - base, rounding[i], decompose) for i, model in enumerate(models)]
    if any(part.values.any() for part in cut):
        return cut
    return [decompose(model - base) for model in models]


def _triplets(delta: Tensor, rounding: Tensor, decompose: Callable[[Tensor], Svd]) -> Svd:
    """Return the triplets of one task vector, the cut ones only where the others are rounding error."""
    largest, norm = rounding.tolist()
    whole = decompose(delta)
    n_kept = int((whole.values > largest).sum())
    if n_kept == len(whole.values):
        return whole
    left, values, right = whole.left[:, :n_kept], whole.values[:n_kept], whole.right[:, :n_kept]
    rest = delta - (left * values.to(left.dtype)) @ right.T
    return Svd(left, values, right) if _norm(rest) <= _most_explained(delta, norm) else whole


def _most_explained(delta: Tensor, norm: float) -> float:
    """Return the largest norm that the directions below the bound of rounding can have if they are rounding alone.

    Args:
        delta: The task vector, in which float32 has rounding errors, too.
        norm: The expected norm of rounding.
    """
    return max(_EXPLAINED * norm, 2.0**-20 * _norm(delta))


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _narrower(dtype: torch.dtype) -> list[torch.dtype]:
    """Return the float dtypes whose values `dtype` can represent, from the narrowest to `dtype` itself."""
    return [one for one in _GRIDS if one.itemsize < dtype.itemsize] + [dtype]


def _rounded(stored: Tensor, dtype: torch.dtype) -> Tensor:
    return stored if dtype == stored.dtype else stored.to(dtype).to(stored.dtype)
