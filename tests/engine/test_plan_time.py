"""The time of a plan counts arithmetic, from a rate that the last merge on this machine left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import merganser
from merganser.engine.plan.plan import Plan
from merganser.engine.plan.work import arithmetic_seconds, keep_rate, kept_rates
from tests.cli.tiny import state, write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        write(tmp_path / name, state(seed))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "merganser" / "rates.json"


def planned(method: str) -> Plan:
    given = {"parameters": {"weight": 0.5}} if method == "breadcrumbs" else {}
    models = [{"model": name, **given} for name in ("one", "two")]
    return merganser.plan({"merge_method": method, "base_model": "base", "models": models}, threads=1)


def test_a_rate_is_kept_and_used(cache: Path) -> None:
    plan = planned("wudi")
    before = plan.seconds
    keep_rate(plan.tensors, plan.workers, seconds=65.0, moving=5.0)
    assert plan.seconds == pytest.approx(plan.moving_seconds + 60, rel=0.05)
    assert plan.seconds > before
    assert list(json.loads(cache.read_text())) == [f"wudi {plan.method.version}"]
    # that of one method says nothing of another
    assert planned("iso_c").seconds < 30


def test_a_short_merge_keeps_no_rate(cache: Path) -> None:
    merganser.merge(planned("wudi").recipe, "out", threads=1)
    assert not cache.exists()


def test_whole_matrices_take_longer_than_elements() -> None:
    matrices, elements = planned("wudi"), planned("breadcrumbs")
    factor = 10**6  # as if the tensors were larger; the tiny ones take no time
    assert factor * arithmetic_seconds(matrices.tensors, 1, fused=True) > 0
    slow = arithmetic_seconds(elements.tensors, 1, fused=False)
    assert slow == pytest.approx(10 * arithmetic_seconds(elements.tensors, 1, fused=True))
    assert arithmetic_seconds(elements.tensors, 10**6, fused=False) <= slow


@pytest.mark.parametrize("text", ["", "[]", "{", '{"wudi 2": "x", "ties 1": -1, "iso_c 3": NaN}', "\xff"])
def test_a_damaged_file_is_as_none(cache: Path, text: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(text.encode("latin-1"))
    assert kept_rates() == {}
    assert planned("wudi").seconds > 0
    keep_rate(planned("wudi").tensors, 1, 65.0, 5.0)
    assert len(kept_rates()) == 1


def test_a_folder_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.parent.parent.write_text("a file")
    keep_rate(planned("wudi").tensors, 1, 65.0, 5.0)
    assert kept_rates() == {}
