"""Intervals of the held-out test hold the truth as often as they say, also with few items."""

from __future__ import annotations

import math

import numpy as np
import pytest

from merganser.evaluation.scoring.estimate import Estimate
from merganser.search.ends import difference
from merganser.search.scoring.objectives import Objective

LOWER = Objective("x", ((1.0, "x"),), "minimize")


def test_an_interval_of_few_items_is_as_wide_as_students() -> None:
    own, other = Estimate.of_ratio([1, 2, 3, 4, 5], [1] * 5, "items"), Estimate(2.5)
    found = difference(own, other, LOWER)
    assert found.value == -0.5
    assert found.interval is not None
    # five items: 2.7764 errors of sqrt(2.5 / 5)
    assert found.interval[1] + 0.5 == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-6)
    assert difference(other, Estimate(2.0), LOWER).interval is None


@pytest.mark.parametrize(("first", "second", "expected"), [(5, 5, 8.0), (5, 1000, 4.04), (2, 2, 2.0)])
def test_degrees_of_freedom(first: int, second: int, expected: float) -> None:
    one, two = (
        Estimate.of_ratio(np.arange(n) * scale, np.ones(n), key)
        for n, key, scale in (
            (first, "a", math.sqrt(first / _variance(first))),
            (second, "b", math.sqrt(second / _variance(second))),
        )
    )
    total = one + two * (1.0 if second == first else 0.1)
    assert total.degrees_of_freedom == pytest.approx(expected, rel=0.02)
    assert Estimate(1.0).degrees_of_freedom == math.inf


def _variance(n: int) -> float:
    return float(np.var(np.arange(n), ddof=1))


@pytest.mark.parametrize("count", [5, 12])
def test_intervals_hold_the_truth(count: int) -> None:
    chance, held, total = np.random.default_rng(1), 0, 1000
    for _ in range(total):
        hard = chance.normal(size=count)
        figures = [
            Estimate.of_ratio(hard + 0.5 * chance.normal(size=count) + mean, np.ones(count), "items")
            for mean in (0.0, 0.2)
        ]
        interval = difference(figures[0], figures[1], LOWER).interval
        assert interval is not None
        held += interval[0] <= 0.2 <= interval[1]
    assert 0.935 <= held / total <= 0.965
