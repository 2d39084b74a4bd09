"""The time of a plan counts arithmetic, from speeds that are measured on this machine once and kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import merganser
from merganser.engine.kernels import speed
from merganser.engine.plan import work
from merganser.engine.plan.plan import Plan
from merganser.engine.plan.work import arithmetic_seconds, keep_speeds, kept_speeds
from tests.cli.tiny import state, write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        write(tmp_path / name, state(seed))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "merganser" / "speeds.json"


def planned(method: str, **parameters: Any) -> Plan:
    given = {"parameters": {"weight": 0.5}} if method == "breadcrumbs" else {}
    models = [{"model": name, **given} for name in ("one", "two")]
    recipe = {"merge_method": method, "base_model": "base", "models": models, "parameters": parameters}
    return merganser.plan(recipe, threads=1)


def test_speeds_are_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = planned("iso_c").seconds
    kept = json.loads(cache.read_text())
    # one per shape of a matrix, and one of the method for what is not a matrix
    assert {name.split()[0] for name in kept} == {"iso_c", "task_arithmetic"}
    assert all(0 < own < 1e-3 for own in kept.values())
    monkeypatch.setattr(work, "measure_speed", lambda *_, **__: pytest.fail("measured again"))
    assert planned("iso_c").seconds == first
    plan = planned("iso_c")
    assert arithmetic_seconds(plan.tensors, 10**6, fused=True) <= arithmetic_seconds(plan.tensors, 1, fused=True)


def test_other_parameters_have_speeds_of_their_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in place of a measurement, which other work on the machine disturbs
    monkeypatch.setattr(work, "measure_speed", lambda _, given, *__, **___: 1e-6 * given.get("steps", 1))
    few, many = (planned("wudi", steps=steps) for steps in (1, 200))
    assert many.seconds > few.seconds
    assert len(kept_speeds()) > len({own.shape for own in few.tensors if len(own.shape) == 2})


def test_speeds_of_small_tensors_are_not_those_of_large_ones(tmp_path: Path) -> None:
    """A model for trying things out, planned first, must not make plans of real ones a thousand times as long."""
    tiny = planned("breadcrumbs")
    assert tiny.seconds > 0
    before = kept_speeds()
    for seed, name in enumerate(("base", "one", "two")):
        write(tmp_path / name, state(seed, vocab=work._SMALL // 8), vocab_size=work._SMALL // 8)
    large = planned("breadcrumbs")
    assert large.seconds > 0
    fresh = kept_speeds()
    assert {name: fresh[name] for name in before} == before
    assert len(fresh) == len(before) + 1


def test_a_merge_corrects_the_speed_of_its_method_alone() -> None:
    plan = planned("wudi")
    before = plan.seconds
    kept = kept_speeds()
    beside = sum(own for name, own in kept.items() if not name.startswith("wudi"))
    slow = 5 + 9 * (before - plan.moving_seconds)
    # pretend that speeds are those of large tensors, as the merge of tiny ones is too short to be kept
    work._keep({name: own * 1e6 for name, own in kept.items()})
    expected = (before - plan.moving_seconds) * 1e6
    keep_speeds(plan.tensors, seconds=5 + 3 * expected, beside=5.0, fused=plan.fused)
    assert plan.seconds == pytest.approx(plan.moving_seconds + 3 * expected, rel=1e-6)
    assert sum(own for name, own in kept_speeds().items() if not name.startswith("wudi")) == pytest.approx(1e6 * beside)
    # what took far longer than its arithmetic can explain waited for something else
    changed = kept_speeds()
    keep_speeds(plan.tensors, seconds=100 * expected * slow, beside=5.0, fused=plan.fused)
    assert kept_speeds() == changed


def test_a_short_merge_keeps_nothing(cache: Path) -> None:
    merganser.merge(planned("wudi").recipe, "out", threads=1)
    assert not cache.exists()


def test_times_grow_with_the_cube_of_a_matrix_s_sides() -> None:
    def seconds(size: tuple[int, ...]) -> float:
        return 1e-8 * math.prod(size) ** 1.5

    # the largest that is tried takes 0.13 s; what follows is extrapolated
    found = speed._grown(seconds, (4096, 4096), 8.0) * 4096**2
    assert found == pytest.approx(seconds((4096, 4096)), rel=0.01)
    assert speed._grown(lambda _: 0.0, (8, 8), 8.0) == 0.0


def test_a_method_that_refuses_random_numbers_does_not_fail_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr(work, "measure_speed", refuse)
    assert planned("wudi").seconds > 0


@pytest.mark.parametrize("text", ["", "[]", "{", '{"wudi 2": "x", "ties 1": -1, "iso_c 3": NaN, "sce 2": [1]}', "\xff"])
def test_a_damaged_file_is_as_none(cache: Path, text: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(text.encode("latin-1"))
    assert kept_speeds() == {}
    assert planned("breadcrumbs").seconds > 0
    assert len(kept_speeds()) == 1


def test_a_folder_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.parent.parent.write_text("a file")
    assert planned("breadcrumbs").seconds > 0
    assert kept_speeds() == {}
