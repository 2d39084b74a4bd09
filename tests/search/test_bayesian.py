"""Trials where the surrogate errs: angles, sectors, odds, and where places go."""

from __future__ import annotations

import math

import numpy as np
import pytest

from merganser.errors import UnsupportedError
from merganser.search.samplers.bayesian import angles, cuts_of, direction, errors, propose_bayesian, sector_odds
from merganser.search.samplers.own import Past
from merganser.search.space.dimension import Dimension
from merganser.search.study import choose_sampler

PLANE = [Dimension("x", 0.0, 1.0), Dimension("y", 0.0, 1.0)]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_place_has_the_angles_that_it_is_made_of(count: int) -> None:
    own = np.random.default_rng(count).random((20, count - 1)) * math.pi / 2
    places = np.stack([direction(row.tolist()) for row in own])
    assert (places**2).sum(1) == pytest.approx(np.ones(20))
    np.testing.assert_allclose(angles(places * 0.3), own, atol=1e-12)


def test_the_odds_of_sectors() -> None:
    # four sectors of the plane, by hand: errors of 1 and 3 in the first, 0.5 in the second, none seen in the third
    at = np.array([direction([angle]) for angle in (0.1, 0.3, 0.5, 1.5)])
    odds = sector_odds(at, np.array([1.0, 3.0, 0.5, 0.0]), cuts_of(2))
    score = np.array([2.0 + 0.5 * 1.0, 0.5, 2.5, 0.0])
    expected = np.exp(score / 2.5 / 0.07)
    assert odds == pytest.approx(expected / expected.sum())
    assert sector_odds(at, np.zeros(4), 4) == pytest.approx(np.full(4, 0.25))


def test_errors_are_those_of_the_fit() -> None:
    at = np.random.default_rng(0).random((30, 2))
    values = np.stack([at[:, 0] ** 2 - at[:, 1], 100 * at[:, 0] * at[:, 1]], 1)
    assert errors(at, values) == pytest.approx(np.zeros(30), abs=1e-20)
    values[7, 1] += 50
    wrong = errors(at, values)
    assert wrong.argmax() == 7


def test_trials_go_where_the_surrogate_errs() -> None:
    def worth(x: float, y: float) -> float:
        # a quadratic, but for waves in the sector next to the axis of y
        return (
            -((x - 0.6) ** 2) - (y - 0.3) ** 2 + (0.5 * math.sin(40 * y) if math.atan2(y, x) > 3 * math.pi / 8 else 0.0)
        )

    chance = np.random.default_rng(1)
    past = {i: Past(i, (x, y), (worth(x, y),)) for i, (x, y) in enumerate(chance.random((60, 2)).tolist())}
    found = np.array([propose_bayesian(PLANE, past, number, 0) for number in range(60, 160, 2)])
    assert found.min() >= 0.0
    assert found.max() <= 1.0
    assert (angles(found)[:, 0] > 3 * math.pi / 8).mean() > 0.8
    # every second one is at the best place of the surrogate
    best = {tuple(np.round(propose_bayesian(PLANE, past, number, 0), 4)) for number in range(61, 161, 20)}
    assert len(best) == 1


def test_what_it_refuses() -> None:
    for dimensions in (PLANE[:1], [Dimension(name, 0.0, 1.0) for name in "abcdefg"]):
        with pytest.raises(UnsupportedError, match="bayesian takes two to six free values"):
            choose_sampler("bayesian", dimensions, 1, 0, 10)
    with pytest.raises(UnsupportedError, match="bayesian searches numbers"):
        choose_sampler("bayesian", [PLANE[0], Dimension("c", 0, 1, choices=(*"ab",))], 1, 0, 10)
    assert choose_sampler("bayesian", PLANE, 2, 0, 10) == "bayesian"
