"""Competition, attraction and crossover of M2N2, member by member and item by item."""

from __future__ import annotations

from collections.abc import Sequence


def part(scores: Sequence[Sequence[float]], member: int, item: int) -> float:
    total = sum(row[item] for row in scores)
    return scores[member][item] / (total if total > 0 else 1.0)


def fitness(scores: Sequence[Sequence[float]], member: int) -> float:
    return sum(part(scores, member, item) for item in range(len(scores[0])))


def attraction(scores: Sequence[Sequence[float]], first: int, second: int) -> float:
    return sum(max(0.0, part(scores, second, i) - part(scores, first, i)) for i in range(len(scores[0])))


def cross(a: Sequence[float], b: Sequence[float], split: int, share: float) -> list[float]:
    before = [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]
    after = [(1 - share) * x + share * y for x, y in zip(a, b, strict=True)]
    return before[:split] + after[split:]
