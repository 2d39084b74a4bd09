"""Two models at a time: which ones, with which factors, and which free values it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from merganser.errors import UnsupportedError
from merganser.search.samplers.nested import TRIALS, closest
from merganser.search.space.dimension import Dimension
from merganser.search.study import Study, choose_sampler

SPACE = [Dimension(f"parameters.weight[{name}]", 0.0, 1.0, parameter="weight", per_model=True) for name in "abc"]
GOAL = (0.6, 0.2, 0.4)


def worth(weights: list[float]) -> float:
    return -sum((w - g) ** 2 for w, g in zip(weights, GOAL, strict=True))


def test_closest() -> None:
    scores = [0.9, 0.1, 0.5, 0.52]
    assert closest(scores) == min(itertools.combinations(range(4), 2), key=lambda p: abs(scores[p[0]] - scores[p[1]]))
    assert closest([0.3, 0.3]) == (0, 1)


def test_models_then_pairs_then_all() -> None:
    study = Study(None, SPACE, ["maximize"], "nested", 0, dict.fromkeys([d.name for d in SPACE], 1 / 3))
    found: list[list[float]] = []
    for _ in range(4 + 2 * TRIALS + 4):
        asked = study.ask()
        assert asked is not None
        found.append([float(x) for x in asked.point.values()])
        study.tell(asked, [worth(found[-1])], {}, {})
    assert found[1:4] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    # alone they are worth -0.36, -1.16 and -0.76; a and c and b and c are equally far apart, in floating point b and c less
    first = found[4 : 4 + TRIALS]
    left_out = [i for i in range(3) if all(w[i] == 0 for w in first)]
    assert len(left_out) == 1
    pair = [i for i in range(3) if i not in left_out]
    # a quadratic is found exactly: the best factors of two models are their own goals
    best = max(first, key=worth)
    assert [best[i] for i in pair] == pytest.approx([GOAL[i] for i in pair], abs=1e-5)
    # the second stage keeps the proportion of the first
    second = found[4 + TRIALS : 4 + 2 * TRIALS]
    for weights in second:
        if weights[pair[0]] > 1e-6:
            assert weights[pair[1]] / weights[pair[0]] == pytest.approx(best[pair[1]] / best[pair[0]])
    assert max(second, key=worth) == pytest.approx(GOAL, abs=1e-4)


def test_failed_trials_are_passed_over() -> None:
    study = Study(None, SPACE, ["minimize"], "nested", 0, dict.fromkeys([d.name for d in SPACE], 1 / 3))
    for number in range(4 + 2 * TRIALS):
        asked = study.ask()
        assert asked is not None
        point = [float(x) for x in asked.point.values()]
        study.tell(asked, None if number % 3 == 1 else [-worth(point)], {}, {})
    assert min(each.values[0] for each in study.told if each.values) < 0.02


@pytest.mark.parametrize(
    "dimensions",
    [
        SPACE[:1],
        [*SPACE, Dimension("parameters.lambda", 0.0, 1.0, parameter="lambda")],
        [Dimension("parameters.weight[a][1/2]", 0.0, 1.0, parameter="weight", per_model=True), Dimension("parameters.weight[a][2/2]", 0.0, 1.0, parameter="weight", per_model=True)],
        [Dimension(d.name, 0.1, 1.0, parameter="weight", per_model=True) for d in SPACE],
        [Dimension("merge_method", 0, 1, choices=("a", "b")), *SPACE],
    ],
)  # fmt: skip
def test_what_it_refuses(dimensions: list[Any]) -> None:
    with pytest.raises(
        UnsupportedError, match="nested merges two models at a time, so the free values must be one weight"
    ):
        choose_sampler("nested", dimensions, 1, 0, 10)
    with pytest.raises(UnsupportedError, match="nested takes one objective"):
        choose_sampler("nested", SPACE, 2, 0, 10)
