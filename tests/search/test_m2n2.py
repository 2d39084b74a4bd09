"""M2N2: against the literal form, its laws, and searches with it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from merganser.search import search
from merganser.search.samplers.m2n2 import attraction, cross, fitness, propose_m2n2
from merganser.search.samplers.own import Past, to_unit
from merganser.search.space.space import Dimension
from merganser.search.study import Study
from tests.cli.tiny import run
from tests.reference import m2n2 as reference
from tests.search.conftest import RECIPE

SPACE = [Dimension(name, 0.0, 1.0) for name in "wxyz"]
START = dict.fromkeys("wxyz", 0.5)
GOALS = [(0.2, 0.8, 0.5, 0.6), (0.4, 0.7, 0.6, 0.5), (0.3, 0.6, 0.7, 0.4)]


def scores(point: Mapping[str, float | int]) -> list[float]:
    at = [to_unit(d, point[d.name]) for d in SPACE]
    return [math.exp(-4 * math.dist(at, goal)) for goal in GOALS]


def told(seed: int, trials: int, path: Path | None = None, cuts: tuple[int, ...] = ()) -> list[object]:
    study = Study(path, SPACE, ["maximize"], "m2n2", seed, START)
    for number in range(trials):
        asked = study.ask()
        if number in cuts:
            study = Study(path, SPACE, ["maximize"], "m2n2", seed, START)
            asked = study.ask()
        own = scores(asked.point)
        # some fail, some end early and have no scores of all items
        about = {} if number % 6 == 4 else {"scores": own}
        study.tell(asked, None if number % 9 == 8 else [sum(own)], about, {})
    return [(each.point, each.values) for each in study.told]


def test_against_the_reference() -> None:
    chance = np.random.default_rng(0)
    table = (chance.random((7, 30)) * (chance.random((7, 30)) < 0.3)).astype(np.float64)
    table[:, 4] = 0.0
    rows = table.tolist()
    assert fitness(table) == pytest.approx([reference.fitness(rows, i) for i in range(7)])
    assert attraction(table, 2) == pytest.approx([reference.attraction(rows, 2, i) for i in range(7)])
    # every item that anybody scores on is shared completely
    assert fitness(table).sum() == pytest.approx(int((table.sum(0) > 0).sum()))
    a, b = (0.1, 0.2, 0.3, 0.4), (0.9, 0.7, 0.5, 0.3)
    for split in range(5):
        assert cross(SPACE, a, b, split, 0.3) == pytest.approx(reference.cross(a, b, split, 0.3))
    assert cross(SPACE, a, b, 4, 1.0) == a
    assert cross(SPACE, a, b, 0, 1.0) == b
    assert cross(SPACE, a, a, 2, 0.7) == pytest.approx(a)
    choices = [Dimension("c", 0, 2, choices=("p", "q", "r")), SPACE[0]]
    assert cross(choices, (0.1, 0.0), (0.9, 1.0), 1, 0.4) == pytest.approx((0.9, 0.4))


def test_equal_members_have_any_partner() -> None:
    assert attraction(np.ones((3, 5)), 1).tolist() == [1.0, 0.0, 1.0]


def test_a_partner_solves_what_the_parent_does_not() -> None:
    past = {i: Past(i, (i / 1000,), (1.0,), (1.0, 0.0)) for i in range(9)}
    past[9] = Past(9, (1.0,), (1.0,), (0.0, 1.0))
    found = [propose_m2n2(SPACE[:1], past, number, 0)[0] for number in range(10, 310)]
    # every child has the rare skill of the last one for a parent; two at random would have it in a fifth of the children
    assert sum(x > 0.15 for x in found) > 0.75 * len(found)
    assert 0.4 < np.mean(found) < 0.6


def test_trials_without_scores_are_no_parents() -> None:
    past = {i: Past(i, (0.2 + 0.01 * i,), (1.0,), (1.0, float(i))) for i in range(3)}
    past |= {3: Past(3, (0.9,), None, (9.0, 9.0)), 4: Past(4, (0.9,), (9.0,), None)}
    # mutations are normal steps of 0.05
    assert np.mean([propose_m2n2(SPACE[:1], past, number, 1)[0] for number in range(10, 110)]) < 0.25


def test_better_than_the_best_of_as_many_random_ones() -> None:
    wins = 0
    for seed in range(5):
        chance = random.Random(seed)
        drawn = [sum(scores({name: chance.random() for name in "wxyz"})) for _ in range(60)]
        values = [value for _, value in told(seed, 60)]  # type: ignore[misc]
        wins += max(value[0] for value in values if value) > max(drawn)
    assert wins >= 4


def test_killed_ten_times_and_continued(tmp_path: Path) -> None:
    cuts = tuple(random.Random(3).sample(range(30), 10))
    assert told(1, 30, tmp_path / "cut.log", cuts) == told(1, 30)


def test_a_search(tmp_path: Path) -> None:
    found = search(
        RECIPE, tmp_path / "out", ["one.jsonl", "quiz.jsonl"], objectives=["one/bits_per_byte"], trials=14,
        sampler="m2n2", dtype="float32", limit=8,
    )  # fmt: skip
    entries = [json.loads(line) for line in (tmp_path / "out" / "trials.log").read_text().splitlines()]
    kept = [entry["user_attr"]["scores"] for entry in entries if "scores" in entry.get("user_attr", {})]
    assert len(kept) == sum(not trial.stopped for trial in found.trials)
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    own = {e["task"]: e["content"]["columns"] for e in lines if e.get("model") == "trial-0001" and e["batch"] == 0}
    expected = [2 ** -(b / n) for b, n in zip(own["one"]["bits"], own["one"]["bytes"], strict=True)]
    assert kept[0] == pytest.approx(expected + [float(y) for y in own["quiz"]["correct"]])


def test_a_command_has_no_items(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    arguments = ("--command", "x {model}", "--objective", "s:maximize", "--sampler", "m2n2")
    found = run("search", tmp_path / "r.yaml", tmp_path / "out", *arguments)
    assert found.code == 2
    assert "sampler: m2n2 needs the score of each item (--tasks)" in found.err
    assert not (tmp_path / "out").exists()
