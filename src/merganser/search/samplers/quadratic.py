"""A quadratic surrogate of each objective, and its best place next, as in MAP.

Source: Li et al., MAP: low-compute model merging with amortized Pareto fronts, 2024, arXiv 2406.07529. There the surrogate is a quadratic of the models'
coefficients under a link function, and its front is looked for far outside of what was sampled. Here it is fitted to the
objectives themselves by least squares, and its best place is looked for within the ranges of the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..space.dimension import Dimension
from .own import Past, chance

_STARTS = 8
_NEAR = 1e-4
_SPARE = 1.25
"""Trials before the first fit, as a multiple of the number of coefficients."""


def propose_quadratic(
    dimensions: Sequence[Dimension], past: Mapping[int, Past], number: int, seed: int
) -> Sequence[float]:
    """Return the next place: as `Propose`.

    The first trials are at random. Of several objectives each trial improves another weighted sum of them, each scaled by the
    range of what was measured; the weights are uniform on the simplex. Where a place was tried before, one at random is tried.
    """
    random = chance(seed, number)
    anywhere = [random.random() for _ in dimensions]
    scored = [trial for _, trial in sorted(past.items()) if trial.values is not None]
    if len(scored) < np.ceil(_SPARE * count_terms(len(dimensions))):
        return anywhere
    at = np.array([trial.at for trial in scored])
    values = np.array([trial.values for trial in scored])
    spread = np.ptp(values, axis=0)
    weights = np.array([random.expovariate(1.0) for _ in range(values.shape[1])])
    weights = weights / weights.sum() / np.where(spread > 0, spread, 1.0)
    fitted = fit_quadratic(at, values) @ weights
    starts = np.array(
        [[random.random() for _ in dimensions] for _ in range(_STARTS - 1)] + [at[np.argmax(values @ weights)]]
    )
    best = maximum(fitted, starts)
    if np.abs(at - best).max(axis=1).min() < _NEAR:
        return anywhere
    return [float(x) for x in best]


def count_terms(dimensions: int) -> int:
    """Return the number of coefficients of a quadratic: (K + 1)(K + 2) / 2."""
    return (dimensions + 1) * (dimensions + 2) // 2


def terms(at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1, the coordinates, and their products in pairs, float64 [n, (K + 1)(K + 2) / 2], of places [n, K]."""
    first, second = np.triu_indices(at.shape[1])
    return np.concatenate([np.ones((len(at), 1)), at, at[:, first] * at[:, second]], axis=1)


def fit_quadratic(at: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the coefficients of `terms` by least squares, [terms, objectives].

    Args:
        at: Places, float64 [n, K].
        values: Objectives, float64 [n, objectives].
    """
    return np.linalg.lstsq(terms(at), values, rcond=None)[0].astype(np.float64)


def maximum(coefficients: NDArray[np.float64], starts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the highest place of a quadratic in the unit cube that is found from some starts.

    Args:
        coefficients: Of `terms`, float64 [terms].
        starts: Places, float64 [n, K].
    """
    from scipy.optimize import minimize

    count = starts.shape[1]
    linear, products = coefficients[1 : count + 1], np.zeros((count, count))
    products[np.triu_indices(count)] = coefficients[count + 1 :]
    both = products + products.T
    ends = [
        minimize(
            lambda x: (-(linear @ x + x @ products @ x), -(linear + both @ x)),
            start,
            jac=True,
            bounds=[(0.0, 1.0)] * count,
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-12},
        )
        for start in starts
    ]
    found: NDArray[np.float64] = min(ends, key=lambda end: end.fun).x
    return found
