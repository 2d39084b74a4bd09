"""Parents that solve what few others solve, and partners that solve what the parent does not: M2N2 over the free values of a recipe.

Each item is a resource that the members of an archive share in proportion to their scores, so that a member with rare skills is worth
more than one that is good at what all can do. A child is a mixture of two members, with the shares exchanged at a split point in the
order of the free values. Every child is a recipe of the original models, so lineages never make merges of merges.

Source: Abrantes et al., Competition and attraction improve model fusion, GECCO 2025, arXiv 2508.16204, and its published code. There the split point
lies anywhere in the weights of the models, which are mixed by SLERP; here it lies between free values (`per: layers:N` gives several along
the depth), which are mixed linearly, and each number is
mutated by a small normal step, without which no child would leave the box around the first places. Trials without scores of all items (failed, ended early, or missing a bound) do not enter the archive.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..space.dimension import Dimension
from .own import Past, chance

_START = 10
"""Trials before the first child; all but the first of the search at random places."""
_SIZE = 20
_STEP = 0.05
"""Standard deviation of the mutation, as a share of each range."""


def propose_m2n2(dimensions: Sequence[Dimension], past: Mapping[int, Past], number: int, seed: int) -> Sequence[float]:
    """Return the next place: as `Propose`."""
    draws = chance(seed, number)
    members = _archive(past)
    if number < _START or len(members) < 2:
        return tuple(draws.random() for _ in dimensions)
    scores = np.array([member.items for member in members])
    first = _pick(fitness(scores), draws)
    second = _pick(attraction(scores, first), draws)
    split, share = draws.randint(0, len(dimensions)), draws.random()
    child = cross(dimensions, members[first].at, members[second].at, split, share)
    return tuple(
        at if dimension.choices is not None else min(max(at + draws.gauss(0.0, _STEP), 0.0), 1.0)
        for dimension, at in zip(dimensions, child, strict=True)
    )


def shared(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the part of each item that each member gets.

    Args:
        scores: At least 0, shape [members, items].
    """
    total = scores.sum(0)
    return np.asarray(scores / np.where(total > 0, total, 1.0), np.float64)


def fitness(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of the parts of items that each member gets, shape [members]."""
    return np.asarray(shared(scores).sum(1), np.float64)


def attraction(scores: NDArray[np.float64], first: int) -> NDArray[np.float64]:
    """Return how much more than a member each other one gets of the items on which it gets more, shape [members]."""
    parts = shared(scores)
    found = np.maximum(parts - parts[first], 0.0).sum(1)
    if not found.any():
        # no other member is better on any item: take any
        found = np.ones(len(parts))
    found[first] = 0.0
    return np.asarray(found, np.float64)


def cross(
    dimensions: Sequence[Dimension], first: Sequence[float], second: Sequence[float], split: int, share: float
) -> tuple[float, ...]:
    """Return a mixture of two places; of choices, that of the larger share.

    Args:
        dimensions: The search space.
        first: A place.
        second: A place.
        split: Number of dimensions in which the share is that of the first; in the others it is that of the second.
        share: The share, from 0 to 1.
    """
    found = []
    for i, (dimension, a, b) in enumerate(zip(dimensions, first, second, strict=True)):
        own = share if i < split else 1 - share
        found.append((a if own >= 0.5 else b) if dimension.choices is not None else own * a + (1 - own) * b)
    return tuple(found)


def _archive(past: Mapping[int, Past]) -> list[Past]:
    members: list[Past] = []
    for number in sorted(past):
        trial = past[number]
        if trial.items is None or trial.values is None or any(trial.at == member.at for member in members):
            continue
        members.append(trial)
        if len(members) > _SIZE:
            del members[int(np.argmin(fitness(np.array([member.items for member in members]))))]
    return members


def _pick(weights: NDArray[np.float64], draws: random.Random) -> int:
    if not weights.any():
        return draws.randrange(len(weights))
    return draws.choices(range(len(weights)), weights.tolist())[0]
