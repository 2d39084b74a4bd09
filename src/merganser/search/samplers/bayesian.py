"""A quadratic surrogate, with trials where it errs, as in the Bayesian form of MAP.

Source: Li et al., MAP: low-compute model merging with amortized Pareto fronts, 2024, arXiv 2406.07529, and its published code: places are
sorted into sectors by their direction from the origin, a sector is drawn by the softmax of how much the surrogate errs in it, and the
next place is anywhere in it. There the errors of each task's surrogate are looked at, and a deviation is estimated by leaving
out places at random; here it is that of the errors in the sector, and a sector without a trial counts as the worst. There all trials are
spent so before the front is looked for; here every second one is at the best place of the surrogate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..space.dimension import Dimension
from .own import Past, chance
from .quadratic import count_terms, fit_quadratic, propose_quadratic, terms

_SPARE = 1.25
_DEVIATIONS = 0.5
_TEMPERATURE = 0.07
_NEAREST = 0.2
"""Smallest distance from the origin, as a share of what is inside the ranges."""


def propose_bayesian(
    dimensions: Sequence[Dimension], past: Mapping[int, Past], number: int, seed: int
) -> Sequence[float]:
    """Return the next place: as `Propose`."""
    count = len(dimensions)
    scored = [trial for _, trial in sorted(past.items()) if trial.values is not None]
    if number % 2 or len(scored) < math.ceil(_SPARE * count_terms(count)):
        return propose_quadratic(dimensions, past, number, seed)
    at, values = np.array([trial.at for trial in scored]), np.array([trial.values for trial in scored])
    draws = chance(seed, number, 2)
    odds = sector_odds(at, errors(at, values), cuts_of(count))
    [index] = draws.choices(range(len(odds)), odds.tolist())
    sector = _sectors(count)[index]
    width = math.pi / 2 / cuts_of(count)
    towards = direction([width * (k + draws.random()) for k in sector])
    # as far as the range goes in this direction
    border = 1.0 / towards.max()
    return [min(float(x), 1.0) for x in towards * border * draws.uniform(_NEAREST, 1.0)]


def errors(at: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the squared error of the surrogate at each place, summed over the objectives, each scaled by its range, [n].

    Args:
        at: Places, float64 [n, K].
        values: Objectives, float64 [n, objectives].
    """
    spread = np.ptp(values, axis=0)
    scaled = values / np.where(spread > 0, spread, 1.0)
    found: NDArray[np.float64] = ((scaled - terms(at) @ fit_quadratic(at, scaled)) ** 2).sum(1)
    return found


def cuts_of(count: int) -> int:
    """Return into how many parts each angle is divided: 4 below four dimensions, else 2."""
    return 4 if count < 4 else 2


def angles(at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the hyperspherical angles of places, from 0 to pi / 2, float64 [n, K - 1].

    Args:
        at: Places with no coordinate below 0, float64 [n, K].
    """
    rest = np.sqrt(np.cumsum(at[:, ::-1] ** 2, 1))[:, ::-1]
    return np.arctan2(rest[:, 1:], at[:, :-1])


def direction(angles: Sequence[float]) -> NDArray[np.float64]:
    """Return the place at distance 1 with these angles, float64 [K]."""
    found, rest = [], 1.0
    for angle in angles:
        found.append(rest * math.cos(angle))
        rest *= math.sin(angle)
    return np.array([*found, rest])


def sector_odds(at: NDArray[np.float64], wrong: NDArray[np.float64], cuts: int) -> NDArray[np.float64]:
    """Return the probability of each sector to have the next trial.

    Args:
        at: Places, float64 [n, K].
        wrong: From `errors`, [n].
        cuts: From `cuts_of`.
    """
    own = np.minimum((angles(at) / (math.pi / 2) * cuts).astype(np.int64), cuts - 1)
    scores = []
    for sector in _sectors(at.shape[1]):
        inside = wrong[(own == sector).all(1)]
        scores.append(inside.mean() + _DEVIATIONS * inside.std() if len(inside) else np.nan)
    found = np.array(scores)
    most = np.nanmax(found)
    found = np.where(np.isnan(found), most, found)
    weights = np.exp((found / most if most > 0 else found * 0.0) / _TEMPERATURE - 1 / _TEMPERATURE)
    return np.asarray(weights / weights.sum(), np.float64)


def _sectors(count: int) -> list[tuple[int, ...]]:
    return [*itertools.product(range(cuts_of(count)), repeat=count - 1)]
