"""p-, gp-, mp- and gmp-IRT (tinyBenchmarks, MERGE3), one ability, item by item: abilities by narrowing an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def chance(a: float, b: float, ability: float) -> float:
    return 1 / (1 + math.exp(-(a * ability - b)))


def smallest(loss: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def unlikely(a: Sequence[float], b: Sequence[float], answers: Sequence[float], ability: float) -> float:
    total = 0.0
    for slope, level, answer in zip(a, b, answers, strict=True):
        p = chance(slope, level, ability)
        total -= math.log(p if answer else 1 - p)
    return total


def own_ability(a: Sequence[float], b: Sequence[float], answers: Sequence[float]) -> float:
    return smallest(lambda t: unlikely(a, b, answers, t) + t * t / 2, -20, 20)


def mixed_ability(a: Sequence[float], b: Sequence[float], answers: Sequence[float], parents: Sequence[float]) -> float:
    # mixtures of numbers with shares from 0 to 1 are the numbers between the ends
    return smallest(lambda t: unlikely(a, b, answers, t), min(parents), max(parents))


def estimate(
    name: str, a: Sequence[float], b: Sequence[float], seen: dict[int, float], parents: Sequence[float]
) -> float:
    where = sorted(seen)
    part = ([a[i] for i in where], [b[i] for i in where], [seen[i] for i in where])
    ability = mixed_ability(*part, parents) if "mp" in name else own_ability(*part)
    share = len(seen) / len(a)
    average = sum(seen.values()) / len(seen)
    rest = [chance(a[i], b[i], ability) for i in range(len(a)) if i not in seen]
    value = share * average + ((1 - share) * sum(rest) / len(rest) if rest else 0.0)
    return (average + value) / 2 if name.startswith("g") else value
