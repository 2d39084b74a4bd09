"""Control variates: against the literal form, their laws, and searches whose trials are ended with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from merganser.evaluation.scoring.estimate import Estimate
from merganser.search import search
from merganser.search.estimators.control_variate import fit_beta, with_control
from tests.cli.tiny import run
from tests.reference import control_variate as reference
from tests.search.conftest import RECIPE

WIDE = RECIPE.replace("[-1, 1]", "[-60, 1]")


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    return chance.random(count) + 1.0, chance.integers(5, 50, count).astype(np.float64)


def test_its_laws() -> None:
    (x, size), (noise, _) = drawn(12, 0), drawn(12, 1)
    control = Estimate.of_ratio(x * size, size, "seen")
    whole = Estimate(1.7)
    # a figure that is the control: what the control is on all items
    assert with_control(control, control, whole).value == pytest.approx(1.7, abs=1e-15)
    # three times the control: the slope is found
    assert fit_beta(control * 3.0, control) == pytest.approx(3.0)
    # without any spread nothing can be corrected
    flat = Estimate.of_ratio(size, size, "seen")
    own = Estimate.of_ratio(noise * size, size, "seen")
    assert with_control(own, flat, whole).value == own.value
    assert with_control(own, Estimate(1.0), whole).value == own.value


def test_it_is_nearer_than_the_mean_where_models_are_alike() -> None:
    chance, misses = np.random.default_rng(0), []
    for _ in range(200):
        hard = chance.normal(size=200)
        control, own = hard + 0.3 * chance.normal(size=200), 0.5 * hard + 0.3 * chance.normal(size=200)
        ones = np.ones(200)
        seen, all_of_it = (Estimate.of_ratio(y[:40], ones[:40], "seen") for y in (own, control))
        found = with_control(seen, all_of_it, Estimate.of_ratio(control, ones, "all"))
        fixed = seen.value - all_of_it.value + control.mean()
        misses.append([each - own.mean() for each in (found.value, seen.value, fixed)])
    fitted, plain, one = np.sqrt(np.mean(np.square(misses), 0))
    # a slope of 1, where it is a half, loses much of what the correction brings
    assert fitted < 0.75 * plain
    assert fitted < 0.85 * one


def pairs(lines: list[dict], model: str, task: str, waves: tuple[int, ...]) -> list[tuple[float, float]]:
    own = [
        e["content"]["columns"]
        for e in lines
        if e.get("model") == model and e.get("task") == task and e["batch"] in waves
    ]
    return [pair for c in own for pair in zip(c["bits"], c["bytes"], strict=True)]


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]


def test_hopeless_trials_are_told_with_the_best_one_as_control(tmp_path: Path) -> None:
    found = search(WIDE, tmp_path, ["one.jsonl"], trials=6, sampler="random", dtype="float32")
    lines, best = read(tmp_path), found.trials[0]
    ended = 0
    for trial in found.trials[1:]:
        assert trial.values is not None
        assert best.values is not None
        if not trial.stopped:
            best = min(best, trial, key=lambda each: each.values or ())
            continue
        waves = (0,) if trial.items == 5 else (0, 1)
        own, control = (pairs(lines, name, "one", waves) for name in (trial.name, best.name))
        expected = reference.estimate(own, [control], [pairs(lines, best.name, "one", (0, 1, 2))])
        # never above the one that it was found to be worse than
        assert trial.values[0] == pytest.approx(max(expected, best.values[0]), rel=1e-9)
        ended += 1
    assert ended


def test_a_search_with_the_models_as_control(tmp_path: Path) -> None:
    found = search(
        WIDE, tmp_path, ["one.jsonl"], trials=6, sampler="random", dtype="float32", estimator="control_variate"
    )
    lines, best = read(tmp_path), found.trials[0]
    models = ("base", "a", "b")
    assert any(trial.stopped for trial in found.trials)
    for trial in found.trials:
        assert trial.values is not None
        if trial.stopped:
            own = pairs(lines, trial.name, "one", (0,))
            assert trial.items == len(own) == 5
            seen, whole = ([pairs(lines, name, "one", waves) for name in models] for waves in ((0,), (0, 1, 2)))
            assert trial.values[0] == pytest.approx(reference.estimate(own, seen, whole), rel=1e-9)
            assert best.values is not None
            assert trial.values[0] >= best.values[0]
        else:
            assert trial.items == 20
            best = min(best, trial, key=lambda each: each.values or ())
    assert found.best == best


def test_it_has_no_parameters(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    found = run("search", tmp_path / "r.yaml", tmp_path / "out", "--tasks", "one.jsonl", "--estimator", "control_variate", "--item-parameters", "p.json")  # fmt: skip
    assert found.code == 2
    assert "item-parameters: are of item response theory; control_variate has none, so leave them out" in found.err
