"""`merganser auto`: the portfolio, the search around its best, the proof, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from merganser.errors import MergeError
from merganser.evaluation.scoring.estimate import Estimate
from merganser.recipe import check_recipe, load_recipe
from merganser.search.auto import Choice, auto
from merganser.search.auto import run as auto_run
from merganser.search.auto.portfolio import around, candidates
from merganser.search.auto.run import _recommend
from merganser.search.ends import End
from merganser.search.objectives import Objective
from merganser.search.space import Space
from tests.cli.tiny import run

RECOVERED = Objective("recovered/mean", ((1.0, "recovered/mean"),), "maximize")
SHORT = ("linear", "ties", "task_arithmetic-1")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A portfolio of three, and three trials, however long they take."""
    listed = lambda *given, **more: [c for c in candidates(*given, **more) if c.name in SHORT]  # noqa: E731
    monkeypatch.setattr(auto_run, "candidates", listed)
    monkeypatch.setattr(auto_run, "_PORTFOLIO", 1e6)
    whole = auto_run.Trials.run
    monkeypatch.setattr(auto_run.Trials, "run", lambda self, _, __, progress: whole(self, 3, None, progress))


def made_best(out: Path, **options: Any) -> Choice:
    given = {"minutes": 0.2, "dtype": "float32", "limit": 24, **options}
    return auto("base", ["calm", "cool"], out, ["one.jsonl", "two.jsonl"], **given)


def test_every_recipe_suits_its_method() -> None:
    for adapters in (False, True):
        listed = candidates("base", ["a", "b"], adapters=adapters)
        assert len({each.recipe for each in listed}) == len(listed)
        assert len({each.name for each in listed}) == len(listed)
        for candidate in listed:
            check_recipe(load_recipe(candidate.recipe))
            space = Space(around(candidate, "base", ["a", "b"]))
            check_recipe(load_recipe(space.resolve(space.start())))
            # the search begins where the candidate is
            own = candidate.parameters.get("weight", 1.0)
            scale = own if "weight" in space.dimensions[0].name else candidate.parameters["lambda"]
            assert set(space.start().values()) <= {scale, 0.5}
            assert len(space.dimensions) == 6


@pytest.mark.usefixtures("short")
def test_it_finds_merges_and_proves(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = made_best(out)
    assert set(found.domains) == {"one", "two"}
    assert [tried.name for tried in found.tried] == [*SHORT]
    assert found.around
    values = [tried.verdict.values[0] for tried in found.tried if tried.verdict] + [
        t.values[0] for t in found.around if t.values
    ]
    recipe = (out / "winner.yaml").read_text()
    assert recipe.startswith("# found by merganser auto: ")
    roles = [end.role for end in found.ends]
    assert roles[:4] == ["winner", "input", "input", "input"]
    winner = found.ends[0]
    assert winner.values is not None
    single = max(end.values[0].value for end in found.ends[1:4] if end.values)
    assert winner.values[0].value > single
    assert max(values) > single
    assert found.recommended == "winner"
    assert found.merged == out / "merged"
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(found.to_json()))
    before = (out / "items.jsonl").read_bytes()
    again = made_best(out)
    assert (out / "items.jsonl").read_bytes() == before
    assert again.to_json()["ends"] == found.to_json()["ends"]
    (out / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(MergeError, match=r"mine\.txt"):
        made_best(out)
    assert (out / "merged" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("winner", "single", "average", "recommended"),
    [(0.8, 0.5, 0.6, "winner"), (0.55, 0.5, 0.6, "winner"), (0.2, 0.5, 0.6, "average"), (0.2, 0.7, 0.6, "expert"), (0.2, 0.7, 0.1, "expert")],
)  # fmt: skip
def test_what_is_recommended(winner: float, single: float, average: float, recommended: str) -> None:
    ends = [
        End(name, role, (Estimate.of_error(value, 0.03, name),))
        for name, role, value in (("winner", "winner", winner), ("expert", "input", single), ("average", "average", average))
    ]  # fmt: skip
    assert _recommend(ends, RECOVERED) == recommended


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base", "calm", "cool", "out"), "auto: tasks are missing (--tasks NAME=FILE...): texts (.txt), documents or"),
        (("base", "calm", "out", "--tasks", "one.jsonl"), "auto: merges two or more experts of one base, got 1"),
        (("base", "calm", "cool", "out", "--tasks", "one.jsonl", "--minutes", "0"), "minutes: must be above 0, got 0"),
        (("base", "calm", "nowhere", "out", "--tasks", "one.jsonl"), "model 'nowhere' not found"),
        (("base", "calm", "cool", "out", "--tasks", "none.txt"), "none.txt: there is no such file"),
        (("calm", "base", "b", "out", "--tasks", "one.jsonl", "--limit", "16"), "auto: on none of these tasks one of the models beats the base"),
    ],
)  # fmt: skip
def test_what_it_refuses(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    found = run("auto", *(str(tmp_path / "out") if word == "out" else word for word in arguments), "--dtype", "float32")
    assert found.code == 2, found.out
    assert message in found.err
    assert not (tmp_path / "out" / "merged").exists()


@pytest.mark.usefixtures("short")
def test_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_run, "_PORTFOLIO", 0)
    out = tmp_path / "out"
    found = run(
        "auto", "base", "calm", "cool", out, "--tasks", "one.jsonl", "two.jsonl", "--minutes", 0.001, "--limit", 24, "--dtype", "float32"
    )  # fmt: skip
    assert found.code == 0, found.err
    lines = found.out.splitlines()
    assert lines[0].startswith("trial 1/3  linear  ")
    assert "note: time for the portfolio is over; 2 of its 3 recipes were not tried" in found.err
    start = lines.index("1 recipe and 0 trials around the best of them")
    assert lines[start + 1].startswith(
        "share of the gain of the best model of each task over the base that is kept: one ("
    )
    assert lines[start + 2] == "measured on 24 items that nothing was chosen on (± standard error)"
    assert [line.split()[0] for line in lines[start + 4 : start + 8]] == ["winner", "base", "calm", "cool"]
    single = lines[start + 8].partition(",")[0].removeprefix("worse than ")
    assert lines[start + 8 :] == [
        f"worse than {single}, the best single model, beyond the interval: take that instead",
        f"take {single}: nothing that was tried is better; nothing was merged",
    ]
    assert single in ("calm", "cool")
    assert not (out / "merged").exists()
    assert yaml.safe_load((out / "winner.yaml").read_text())["merge_method"] == "linear"
