"""Weights of many models, two at a time: the nested form of MAP.

Source: Li et al., MAP: low-compute model merging with amortized Pareto fronts, 2024, arXiv 2406.07529. The two models, or merges, that are
closest in what they are worth are merged by two factors, found with a quadratic surrogate from twenty trials; the merge takes their
place, and so on until one is left. So the number of trials grows with the number of models, and not with its square. There each merge is
stored; here a merge of merges is the product of its factors, one weight for each model. Of the front that the paper leaves to
the user's preferences, this takes the best place of one objective.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..space.dimension import Dimension
from .own import Past, chance, from_unit, to_unit
from .quadratic import fit_quadratic, maximum, propose_quadratic

TRIALS = 20
"""Trials of each stage."""
_RANDOM = 12
"""Trials of a stage at random places, before those at the best place of the surrogate; it has six coefficients."""
_STARTS = 8
_NEAR = 1e-3

Weights = NDArray[np.float64]


def is_nestable(dimensions: Sequence[Dimension]) -> bool:
    """Return whether the free values are one weight for each of two or more models, each from 0 or below, and nothing else."""
    names = [dimension.name.partition("]")[0] for dimension in dimensions]
    return len({*names}) == len(dimensions) > 1 and all(
        d.choices is None and not d.log and d.parameter == "weight" and d.per_model and d.low <= 0 < d.high
        for d in dimensions
    )


def propose_nested(
    dimensions: Sequence[Dimension], past: Mapping[int, Past], number: int, seed: int
) -> Sequence[float]:
    """Return the next place: as `Propose`.

    First come the models alone, then twenty trials for each of K - 1 merges of two, then the best places of a quadratic of all
    weights.
    """
    count = len(dimensions)
    if number <= count:
        return _place(dimensions, _alone(dimensions, number - 1))
    stage, step = divmod(number - count - 1, TRIALS)
    if stage >= count - 1:
        return propose_quadratic(dimensions, past, number, seed)
    groups = _groups(dimensions, past, stage)
    first, second = closest([score for _, score in groups])
    parents = np.stack([groups[first][0], groups[second][0]])
    draws = chance(seed, number)
    factors = np.array([draws.random(), draws.random()])
    if step >= _RANDOM:
        factors = _best_factors(dimensions, past, parents, _stage(count, stage), factors, seed, number)
    return _place(dimensions, factors @ parents)


def closest(scores: Sequence[float]) -> tuple[int, int]:
    """Return the places of the two scores that differ least."""
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    gaps = [scores[b] - scores[a] for a, b in itertools.pairwise(order)]
    i = min(range(len(gaps)), key=lambda k: gaps[k])
    return min(order[i], order[i + 1]), max(order[i], order[i + 1])


def _stage(count: int, stage: int) -> range:
    first = count + 1 + stage * TRIALS
    return range(first, first + TRIALS)


def _groups(dimensions: Sequence[Dimension], past: Mapping[int, Past], stages: int) -> list[tuple[Weights, float]]:
    """Return the merges that are left after some stages, each as weights of the models, with its score."""
    count = len(dimensions)
    groups = [(_alone(dimensions, i), _score(past.get(i + 1))) for i in range(count)]
    for stage in range(stages):
        first, second = closest([score for _, score in groups])
        own = [groups[first], groups[second]]
        tried = [past[n] for n in _stage(count, stage) if n in past]
        # the merge that was best, or the better one of the two alone
        own += [(_weights(dimensions, each), _score(each)) for each in tried]
        best = max(own, key=lambda each: each[1])
        groups = [group for i, group in enumerate(groups) if i not in (first, second)] + [best]
    return groups


def _best_factors(
    dimensions: Sequence[Dimension],
    past: Mapping[int, Past],
    parents: Weights,
    numbers: range,
    anywhere: Weights,
    seed: int,
    number: int,
) -> Weights:
    """Return the best place of a quadratic of the factors of two parents, or `anywhere` if it was tried."""
    tried = [past[n] for n in numbers if n in past and past[n].value is not None]
    if len(tried) < 6:
        return anywhere
    own = np.stack([_weights(dimensions, each) for each in tried])
    factors = np.linalg.lstsq(parents.T, own.T, rcond=None)[0].T.astype(np.float64)
    values = np.array([[each.value] for each in tried])
    draws = chance(seed, number, 1)
    starts = [[draws.random(), draws.random()] for _ in range(_STARTS - 1)]
    starts.append([float(x) for x in np.clip(factors[int(np.argmax(values))], 0.0, 1.0)])
    best = maximum(fit_quadratic(factors, values)[:, 0], np.array(starts))
    return anywhere if np.abs(factors - best).max(axis=1).min() < _NEAR else best


def _alone(dimensions: Sequence[Dimension], i: int) -> Weights:
    found = np.zeros(len(dimensions))
    found[i] = min(1.0, dimensions[i].high)
    return found


def _weights(dimensions: Sequence[Dimension], trial: Past) -> Weights:
    return np.array([from_unit(d, x) for d, x in zip(dimensions, trial.at, strict=True)], np.float64)


def _place(dimensions: Sequence[Dimension], weights: Weights) -> list[float]:
    return [to_unit(d, min(max(float(w), d.low), d.high)) for d, w in zip(dimensions, weights, strict=True)]


def _score(trial: Past | None) -> float:
    """Return the score of a trial; one without a figure gets a finite score that is lower than any other."""
    return -1e30 if trial is None or trial.value is None else trial.value
