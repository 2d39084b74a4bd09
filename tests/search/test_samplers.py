"""Samplers of ours: what they propose, that they find a maximum, and that a killed study goes on as if it had not been."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from merganser.errors import UnsupportedError
from merganser.search.samplers.own import from_unit, to_unit
from merganser.search.samplers.quadratic import count_terms, fit_quadratic, maximum
from merganser.search.space.space import Dimension
from merganser.search.study import Study, choose_sampler

SPACE = [Dimension("x", -1.0, 1.0), Dimension("y", 0.0, 2.0), Dimension("z", 0.01, 1.0, log=True)]
START = {"x": 0.0, "y": 1.0, "z": 0.1}
GOAL = (0.55, 0.2, 0.75)


def worth(point: Mapping[str, float | int]) -> float:
    return -sum((to_unit(d, point[d.name]) - goal) ** 2 for d, goal in zip(SPACE, GOAL, strict=True))


def told(sampler: str, seed: int, trials: int, path: Path | None = None, cuts: tuple[int, ...] = ()) -> list[object]:
    """Run trials, and end the process at some of them: before they are told, with the journal as it is."""
    study = Study(path, SPACE, ["maximize"], sampler, seed, START)
    for number in range(trials):
        asked = study.ask()
        if number in cuts:
            study = Study(path, SPACE, ["maximize"], sampler, seed, START)
            asked = study.ask()
        assert asked.number == number
        # every seventh fails, and every fifth misses a bound
        study.tell(asked, None if number % 7 == 6 else [worth(asked.point)], {}, {"bound": float(number % 5 == 4)})
    return [(each.point, each.values) for each in study.told]


@pytest.mark.parametrize("sampler", ["greedy", "particles", "quadratic", "genome", "bayesian"])
def test_better_than_the_best_of_as_many_random_ones(sampler: str) -> None:
    wins = 0
    for seed in range(5):
        chance = random.Random(seed)
        best = max(-sum((chance.random() - goal) ** 2 for goal in GOAL) for _ in range(60))
        study = Study(None, SPACE, ["maximize"], sampler, seed, START)
        for _ in range(60):
            asked = study.ask()
            study.tell(asked, [worth(asked.point)], {}, {})
        wins += max(each.values[0] for each in study.told if each.values) > best
    assert wins >= 4


@pytest.mark.parametrize("sampler", ["greedy", "particles", "quadratic", "genome", "bayesian"])
def test_killed_ten_times_and_continued(tmp_path: Path, sampler: str) -> None:
    cuts = tuple(random.Random(3).sample(range(40), 10))
    assert told(sampler, 1, 40, tmp_path / "cut.log", cuts) == told(sampler, 1, 40)


def test_the_direction_counts() -> None:
    study = Study(None, SPACE[:1], ["minimize"], "greedy", 0, {"x": 0.0})
    for _ in range(18):
        asked = study.ask()
        study.tell(asked, [(float(asked.point["x"]) + 0.6) ** 2], {}, {})
    assert min(each.values[0] for each in study.told if each.values) < 1e-12


def test_greedy_keeps_a_choice_and_then_goes_on_with_it() -> None:
    space = [Dimension("method", 0, 0, choices=("a", "b", "c")), Dimension("x", 0.0, 1.0)]
    study = Study(None, space, ["maximize"], "greedy", 0, {"method": 0, "x": 0.5})
    for _ in range(13):
        asked = study.ask()
        study.tell(asked, [float(asked.point["method"] == 1) - abs(float(asked.point["x"]) - 0.3)], {}, {})
    points = [each.point for each in study.told]
    assert [p["method"] for p in points] == [0, 0, 1, 2, *[1] * 9]
    assert [round(float(p["x"]), 12) for p in points[4:]] == [i / 10 for i in range(1, 10)]


def test_trials_that_miss_a_bound_are_not_kept() -> None:
    study = Study(None, SPACE[:1], ["maximize"], "greedy", 0, {"x": 0.0})
    for _ in range(11):
        asked = study.ask()
        x = float(asked.point["x"])
        study.tell(asked, [x], {}, {"bound": x - 0.25})
    # the last is the first of the second sweep: 0.2 in coordinates below the best place, which is x = 0.2
    assert float(study.told[-1].point["x"]) == pytest.approx(0.2 - 0.4)


@pytest.mark.parametrize(
    "dimension",
    [
        *SPACE,
        Dimension("i", 1, 9, integer=True),
        Dimension("s", 0.0, 1.0, step=0.3),
        Dimension("c", 0, 0, choices=(*"abc",)),
    ],
)
def test_coordinates(dimension: Dimension) -> None:
    values = [from_unit(dimension, i / 100) for i in range(-10, 111)]
    assert values == sorted(values)
    assert [from_unit(dimension, to_unit(dimension, value)) for value in values] == pytest.approx(values)
    assert dimension.choices is not None or (values[0] == dimension.low and values[-1] <= dimension.high)


@pytest.mark.parametrize("sampler", ["greedy", "particles", "genome"])
def test_several_objectives_are_refused(sampler: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{sampler} takes one objective"):
        choose_sampler(sampler, SPACE, 2, 0, 10)


@pytest.mark.parametrize("sampler", ["particles", "quadratic"])
def test_choices_are_refused_where_numbers_are_needed(sampler: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{sampler} searches numbers"):
        choose_sampler(sampler, [Dimension("c", 0, 0, choices=(*"ab",))], 1, 0, 10)
    assert choose_sampler("greedy", [Dimension("c", 0, 0, choices=(*"ab",))], 1, 0, 10) == "greedy"


def test_nsga3_takes_three_objectives() -> None:
    study = Study(None, SPACE, ["maximize"] * 3, "nsga3", 0, START)
    for _ in range(22):
        asked = study.ask()
        study.tell(asked, [float(v) for v in asked.point.values()], {}, {})
    assert len(study.told) == 22


def test_the_surrogate_of_a_quadratic_is_exact() -> None:
    draw = np.random.default_rng(0)
    at = draw.random((count_terms(4), 4))
    products, linear = draw.normal(size=(4, 4)), draw.normal(size=4)
    values = np.array([[x @ products @ x + linear @ x + 0.5] for x in at])
    pairs = [products[i, j] + (products[j, i] if i != j else 0.0) for i in range(4) for j in range(i, 4)]
    expected = [0.5, *linear, *pairs]
    np.testing.assert_allclose(fit_quadratic(at, values)[:, 0], expected, atol=1e-9)
    # no place of a grid is higher than the one that is found
    best = maximum(np.array(expected), draw.random((8, 4)))
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * 4), -1).reshape(-1, 4)
    heights = np.einsum("ni,ij,nj->n", grid, products, grid) + grid @ linear
    assert best @ products @ best + linear @ best >= heights.max() - 1e-9


def test_the_first_trial_after_the_fit_is_the_maximum_of_a_quadratic() -> None:
    study = Study(None, SPACE, ["maximize"], "quadratic", 0, START)
    for _ in range(14):
        asked = study.ask()
        study.tell(asked, [worth(asked.point)], {}, {})
    assert study.told[-1].values == pytest.approx((0.0,), abs=1e-10)


def test_the_front_of_two_quadratics() -> None:
    # highest at (0.2, 0.2) and (0.8, 0.8): no other place is better in both than one on the line between them
    space = [Dimension("x", 0.0, 1.0), Dimension("y", 0.0, 1.0)]
    study = Study(None, space, ["maximize", "minimize"], "quadratic", 0, {"x": 0.5, "y": 0.1})
    for _ in range(20):
        asked = study.ask()
        x, y = float(asked.point["x"]), float(asked.point["y"])
        study.tell(asked, [-((x - 0.2) ** 2) - (y - 0.2) ** 2, (x - 0.8) ** 2 + (y - 0.8) ** 2], {}, {})
    front = [(float(each.point["x"]), float(each.point["y"])) for each in study.told[8:]]
    assert all(abs(x - y) < 1e-4 and 0.2 <= x <= 0.8 for x, y in front)
    assert max(x for x, _ in front) - min(x for x, _ in front) > 0.3
