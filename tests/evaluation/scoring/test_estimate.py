"""Standard errors: on data where the answer is known, and against resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from merganser.evaluation.scoring.estimate import Estimate, mean, smallest


def test_the_standard_error_of_a_mean() -> None:
    values = np.array([1.0, 0, 1, 1, 0, 1, 0, 1, 1, 1])
    found = Estimate.of_ratio(values, np.ones(10), "questions")
    assert found.value == pytest.approx(0.7)
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(10))


def test_one_item_has_no_standard_error() -> None:
    assert Estimate.of_ratio([3.0], [2.0], "t").stderr is None
    assert (Estimate.of_ratio([3.0], [2.0], "t") - Estimate.of_error(1.0, 0.1, "u")).stderr is None


def test_given_standard_error() -> None:
    assert Estimate.of_error(2.0, 0.3, "t").stderr == pytest.approx(0.3)


def test_what_models_share_cancels() -> None:
    draw = np.random.default_rng(0)
    hard = draw.normal(100, 30, 50)
    nbytes = draw.integers(40, 60, 50)
    # the second model is better by the same share of every item's bytes
    first, second = (Estimate.of_ratio(hard - gain * nbytes, nbytes, "t") for gain in (0.0, 0.25))
    assert (first - second).value == pytest.approx(0.25)
    assert (first - second).stderr == pytest.approx(0, abs=1e-12)
    apart = Estimate.of_ratio(hard - 0.25 * nbytes, nbytes, "other items")
    assert (first - apart).stderr == pytest.approx(math.hypot(first.stderr, apart.stderr))


def population(draw: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Bits of a base, a merge and an expert on n items, and their bytes: correlated, and of different sizes."""
    nbytes = draw.integers(50, 400, n).astype(float)
    hard = draw.gamma(20, 0.05, n) + 0.5
    gain = 0.4 + 0.15 * draw.normal(size=n)
    base = (hard + 0.02 * draw.normal(size=n)) * nbytes
    expert = base - gain * nbytes
    merged = base - (0.6 * gain + 0.05 * draw.normal(size=n)) * nbytes
    return base, merged, expert, nbytes


def figures(base: np.ndarray, merged: np.ndarray, expert: np.ndarray, nbytes: np.ndarray) -> tuple[Estimate, ...]:
    b, m, e = (Estimate.of_ratio(bits, nbytes, "t") for bits in (base, merged, expert))
    return b, b - m, (b - m) / (b - e)


def test_standard_errors_are_the_scatter_over_samples_of_a_known_population() -> None:
    draw = np.random.default_rng(1)
    samples = [figures(*population(draw, 60)) for _ in range(3000)]
    for rank, truth in ((1, 0.24), (2, 0.6)):
        values = [sample[rank].value for sample in samples]
        said = np.mean([sample[rank].stderr for sample in samples])
        assert np.mean(values) == pytest.approx(truth, abs=0.004)
        assert said == pytest.approx(np.std(values), rel=0.05)
        # two standard errors hold the truth 95 times of 100
        held = np.mean([abs(sample[rank].value - truth) < 1.96 * sample[rank].stderr for sample in samples])
        assert held == pytest.approx(0.95, abs=0.02)


def test_standard_errors_agree_with_the_bootstrap() -> None:
    data = np.array(population(np.random.default_rng(2), 80))
    draw = np.random.default_rng(3)
    picks = draw.integers(0, 80, (4000, 80))
    for rank in range(3):
        again = [figures(*data[:, pick])[rank].value for pick in picks[:2000]]
        assert figures(*data)[rank].stderr == pytest.approx(np.std(again), rel=0.08)


def test_the_mean_over_tasks_adds_independent_errors() -> None:
    parts = [Estimate.of_error(value, 0.3, value) for value in (1.0, 2.0, 6.0)]
    assert mean(parts).value == pytest.approx(3)
    assert mean(parts).stderr == pytest.approx(0.3 / math.sqrt(3))


def test_the_smallest() -> None:
    sure = {"a": Estimate.of_error(0.9, 0.01, "a"), "b": Estimate.of_error(0.2, 0.05, "b")}
    name, value, error = smallest(sure)
    assert (name, value) == ("b", 0.2)
    assert error == pytest.approx(0.05, rel=0.001)
    # the minimum of two equal normal numbers scatters by sqrt(1 - 1/pi)
    equal = {name: Estimate.of_error(0.5, 0.1, name) for name in "ab"}
    assert smallest(equal)[2] == pytest.approx(0.1 * math.sqrt(1 - 1 / math.pi), rel=0.03)
    assert smallest({"a": Estimate.of_ratio([1.0], [1.0], "a")})[2] is None
