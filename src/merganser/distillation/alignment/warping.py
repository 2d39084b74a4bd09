"""Dynamic time warping of two token sequences by edit distance (FuseLLM)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .edit_distance import edit_distances

__all__ = ["Pairs", "partners", "warp"]

Pairs = tuple[int, ...]
"""The tokens that a token is paired with."""


def warp(costs: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return the cheapest path from the first pair to the last.

    Each step goes on in one sequence or in both. Where several lead to the same sum, the step in both is taken, else the one
    in the first sequence.

    Args:
        costs: Of each pair, shape [n, m], neither empty.
    """
    n, m = costs.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    for i in range(n):
        # a step in the second sequence needs the sum to its left, so that this direction cannot be done at once
        before = np.minimum(total[i, :-1], total[i, 1:])
        left = np.inf
        for j in range(m):
            left = costs[i, j] + min(before[j], left)
            total[i + 1, j + 1] = left
    path = [(n - 1, m - 1)]
    i, j = n, m
    while i > 1 or j > 1:
        both, first, second = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        if both <= first and both <= second:
            i, j = i - 1, j - 1
        elif first <= second:
            i -= 1
        else:
            j -= 1
        path.append((i - 1, j - 1))
    return path[::-1]


def partners(tokens: Sequence[bytes], others: Sequence[bytes], *, contained: float = 1.0) -> list[Pairs]:
    """Return for each token the others that the cheapest path pairs it with.

    The cost of a pair is the edit distance of their bytes without the spaces around them. The time is proportional to the
    product of both lengths.

    Args:
        tokens: The bytes of each token.
        others: Those of the other sequence.
        contained: Factor of the cost of two tokens of which one holds the other.
    """
    if not tokens or not others:
        return [()] * len(tokens)
    bare, other_bare = [token.strip(b" ") for token in tokens], [token.strip(b" ") for token in others]
    costs = np.array([[_cost(one, other, contained) for other in other_bare] for one in bare], np.float64)
    found: list[list[int]] = [[] for _ in tokens]
    for i, j in warp(costs):
        found[i].append(j)
    return [tuple(each) for each in found]


def _cost(one: bytes, other: bytes, contained: float) -> float:
    distance = _distance(one, other)
    return contained * distance if contained != 1 and (one in other or other in one) else distance


@lru_cache(maxsize=1 << 18)
def _distance(one: bytes, other: bytes) -> int:
    if one == other:
        return 0
    return int(edit_distances(one, np.frombuffer(other, np.uint8).reshape(1, -1))[0])
