"""Crossover, fitness and survival of GENOME, literally: lists of floats, and random numbers that are handed in."""

from __future__ import annotations


def shares(values: list[float]) -> list[float]:
    """Probability of each to be a parent: its value above the worst, plus a tenth of the spread."""
    worst, best = min(values), max(values)
    if worst == best:
        return [1 / len(values)] * len(values)
    above = []
    for value in values:
        above.append((value - worst) + (best - worst) / 10)
    total = sum(above)
    return [each / total for each in above]


def child(first: list[float], second: list[float], fit_first: float, fit_second: float) -> list[float]:
    """Weights of a merge of two merges, each by its fitness."""
    return [(fit_first * a + fit_second * b) / (fit_first + fit_second) for a, b in zip(first, second, strict=True)]


def survivors(values: list[float], size: int, tournaments: list[list[int]]) -> list[int]:
    """Who survives: the best, then the best of each tournament, which are handed in as numbers of individuals."""
    alive = [max(range(len(values)), key=lambda i: values[i])]
    for members in tournaments:
        if len(alive) == size:
            break
        best = members[0]
        for i in members:
            if values[i] > values[best]:
                best = i
        alive.append(best)
    return alive
