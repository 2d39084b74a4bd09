"""`merganser auto`: the portfolio, the search around its best, the proof, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from merganser.errors import MergeError
from merganser.evaluation.scoring.estimate import Estimate
from merganser.recipe import check_recipe, load_recipe
from merganser.search.auto import Choice, auto
from merganser.search.auto import run as auto_run
from merganser.search.auto.budget import Budget, keep_waves
from merganser.search.auto.outcome import recommend
from merganser.search.auto.portfolio import around, candidates
from merganser.search.auto.texts import halve, read_texts
from merganser.search.ends import End
from merganser.search.scoring.bench import Model
from merganser.search.scoring.objectives import Objective
from merganser.search.space.space import Space
from tests.cli.tiny import run

RECOVERED = Objective("recovered/mean", ((1.0, "recovered/mean"),), "maximize")
SHORT = ("linear", "regmean", "ties", "task_arithmetic-1")
"""Without data there is no regmean."""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A portfolio of three, and three trials, however long they take."""
    listed = lambda *given, **more: [c for c in candidates(*given, **more) if c.name in SHORT]  # noqa: E731
    monkeypatch.setattr(auto_run, "candidates", listed)
    monkeypatch.setattr(auto_run.Budget, "fits", lambda *_: True)
    monkeypatch.setattr(auto_run.Budget, "last_trial", lambda *_: float("inf"))
    whole = auto_run.Trials.run
    monkeypatch.setattr(auto_run.Trials, "run", lambda self, _, __, progress: whole(self, 3, None, progress))


def made_best(out: Path, **options: Any) -> Choice:
    given = {"minutes": 0.2, "dtype": "float32", "limit": 24, **options}
    return auto("base", ["calm", "cool"], out, ["one.jsonl", "two.jsonl"], **given)


@pytest.mark.parametrize("experts", [["a", "b"], ["base+a", "base+b"]])
@pytest.mark.parametrize("sizes", [(), (10, 65_536)])
def test_every_recipe_suits_its_method(experts: list[str], sizes: tuple[int, ...], tmp_path: Path) -> None:
    texts = [tmp_path / f"{size}.txt" for size in sizes]
    for text, size in zip(texts, sizes, strict=True):
        text.write_text("a" * size)
    listed = candidates("base", experts, texts=texts, kept=Path("/kept"))
    assert len({each.recipe for each in listed}) == len(listed)
    assert len({each.name for each in listed}) == len(listed)
    measured = [each.about["models"] for each in listed if each.method == "regmean"]
    # of long texts fewer sequences are read than by default
    assert [[own["data"] for own in models] for models in measured] == (
        [[str(texts[0]), {"files": str(texts[1]), "sequences": 16}]] if sizes else []
    )
    for candidate in listed:
        check_recipe(load_recipe(candidate.recipe))
        space = Space(around(candidate))
        check_recipe(load_recipe(space.resolve(space.start())))
        # the search begins where the candidate is
        own = candidate.parameters.get("weight", 1.0)
        scale = own if "weight" in space.dimensions[0].name else candidate.parameters["lambda"]
        assert set(space.start().values()) <= {scale, 0.5}
        assert len(space.dimensions) == 6


@pytest.mark.usefixtures("short")
def test_it_finds_merges_and_proves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    found = made_best(out)
    assert set(found.domains) == {"one", "two"}
    assert [tried.name for tried in found.tried] == ["linear", "ties", "task_arithmetic-1"]
    assert found.around
    values = [tried.value for tried in found.tried if tried.value is not None]
    values += [t.values[0] for t in found.around if t.values]
    recipe = (out / "winner.yaml").read_text()
    assert recipe.startswith("# found by merganser auto: ")
    roles = [end.role for end in found.ends]
    assert roles[:4] == ["winner", "input", "input", "input"]
    winner = found.ends[0]
    assert winner.values is not None
    single = max(end.values[0][0] for end in found.ends[1:4] if end.values)
    assert winner.values[0][0] > single
    assert max(values) > single
    assert found.recommended == "winner"
    assert found.merged == out / "merged"
    written = (out / "result.json").read_bytes()
    assert found.chosen_from == 3 + len(found.around)
    assert set(found.kept) == {end.name for end in found.ends}
    assert {"recovered/mean", "recovered/worst", "recovered/one"} <= found.kept["winner"].keys()
    before = (out / "items.jsonl").read_bytes()
    lines = [json.loads(line) for line in before.splitlines()]
    spent = [(e["seconds"], len(e["content"]["items"])) for e in lines if e.get("key", "").startswith("model ")]
    # a call that continues scores nothing: it takes over the time that items took, and the recipes that were judged
    budgets: list[Budget] = []
    monkeypatch.setattr(auto_run, "Budget", lambda *given: budgets.append(Budget(*given)) or budgets[-1])
    monkeypatch.setattr(Budget, "fits", lambda *_: False)
    again = made_best(out)
    assert (out / "items.jsonl").read_bytes() == before
    assert again == found
    assert (out / "result.json").read_bytes() == written
    assert budgets[0].item == pytest.approx(sum(s for s, _ in spent) / sum(n for _, n in spent))
    assert budgets[0].item > 0
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
    assert recommend(ends, RECOVERED) == recommended


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base", "calm", "cool", "out"), "auto: tasks are missing (--tasks NAME=FILE...): texts (.txt), documents or"),
        (("base", "calm", "out", "--tasks", "one.jsonl"), "auto: merges two or more experts of one base, got 1"),
        (("base", "calm", "cool", "out", "--tasks", "one.jsonl", "--minutes", "0"), "minutes: must be above 0, got 0"),
        (("base", "calm", "cool", "out", "--data", "calm=one.jsonl"), "data: no text of cool; methods with data need one of every expert"),
        (("base", "calm", "cool", "out", "--tasks", "two.jsonl", "--data", "calm=two.jsonl", "cool=one.jsonl"), "is the text of calm and the task two; a merge that"),
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
    monkeypatch.setattr(auto_run.Budget, "fits", lambda *_: False)
    monkeypatch.setattr(auto_run.Budget, "last_trial", lambda *_: float("-inf"))
    out = tmp_path / "out"
    found = run(
        "auto", "base", "calm", "cool", out, "--tasks", "one.jsonl", "two.jsonl", "--minutes", 0.001, "--limit", 24, "--dtype", "float32"
    )  # fmt: skip
    assert found.code == 0, found.err
    lines = found.out.splitlines()
    assert lines[0].startswith("trial 1/3  linear  ")
    assert "note: not tried, for lack of time: ties, task_arithmetic-1; more --minutes try them" in found.err
    start = lines.index("1 recipe and 0 trials around the best of them")
    assert lines[start + 1] == "the winner is linear, chosen from 1 recipe"
    start += 1
    assert lines[start + 1].startswith(
        "share of the gain of the best model of each task over the base that is kept: one ("
    )
    assert lines[start + 2] == "measured on 6 items that nothing was chosen on (± standard error)"
    head = ["model", "kept, mean", "kept, worst task", "the winner keeps more by (95 % interval)"]
    assert re.split("  +", lines[start + 3].strip()) == head
    assert "note: a quarter of the items is scored, since all would take more than half of the minutes" in found.err
    assert "note: scoring 5 models takes about 0 minutes of the 0.001 even on a part of the items" in found.err
    assert [line.split()[0] for line in lines[start + 4 : start + 8]] == ["winner", "base", "calm", "cool"]
    single = lines[start + 8].partition(",")[0].removeprefix("worse than ")
    assert lines[start + 8 :] == [
        f"worse than {single}, the best single model, beyond the interval: take that instead",
        f"take {single}: nothing that was tried is better; nothing was merged",
        f"wrote {out / 'report.html'}; open it in a browser",
    ]
    assert "a merge with a sidecar gives each model back: merge_method: skillpack, and merganser restore" in found.err
    text = run("report", out, "--text").out
    assert "1 recipe · auto · " in text
    assert f"Take {single}: linear, chosen from 1 recipe, is worse, so nothing was merged." in text
    assert single in ("calm", "cool")
    assert not (out / "merged").exists()
    assert yaml.safe_load((out / "winner.yaml").read_text())["merge_method"] == "linear"


@pytest.mark.usefixtures("short")
def test_texts_alone_are_calibrated_on_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_run.Budget, "fits", lambda _, recipe: "regmean" in recipe)
    monkeypatch.setattr(auto_run._Search, "try_around", lambda _: None)
    out = tmp_path / "out"
    data = {"calm": "one.jsonl", "cool": "two.jsonl"}
    found = auto("base", ["calm", "cool"], out, data=data, minutes=0.2, limit=16, dtype="float32")
    assert [tried.name for tried in found.tried] == ["linear", "regmean"]
    assert all(tried.failed is None for tried in found.tried)
    assert set(found.domains) == {"calm", "cool"}
    assert {path.name for path in (out / "statistics").iterdir()} == {"calm", "cool"}
    # the first half of the documents is calibrated on, the second one scored
    whole = Path("one.jsonl").read_text()
    halves = [(out / "texts" / name).read_text() for name in ("calibrate-calm.jsonl", "calm.jsonl")]
    assert "".join(halves) == whole
    assert [half.count("\n") for half in halves] == [20, 20]


def test_a_text_is_divided_at_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree and more\nfour\n")
    firsts, seconds = halve({"a": tmp_path / "a.txt"}, tmp_path / "texts")
    assert firsts["a"].read_text() == "one\ntwo\nthree and more\n"
    assert seconds["a"].read_text() == "four\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one line", "is one line, and cannot be divided"),
        ("a.jsonl", '{"text": "one"}\n', "is one line, and cannot be divided"),
        ("a.jsonl", '{"context": "q", "choices": [" a", " b"], "gold": 0}\n', "holds questions; as data give texts"),
        ("a.parquet", "PAR1", "only .txt and .jsonl are divided into a half to calibrate on"),
    ],
)
def test_what_is_not_divided(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(MergeError, match=message):
        halve({"a": tmp_path / name}, tmp_path / "texts")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["calmer=one.jsonl"], "'calmer' is no expert. Did you mean 'calm'"),
        (["calm=one.jsonl", "calm=two.jsonl"], "two files for calm"),
        (["calm=one.jsonl"], "no text of cool"),
        (["calm=none.txt", "cool=one.jsonl"], "none.txt: there is no such file"),
    ],
)
def test_which_texts_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        read_texts(given, ["calm", "cool"])


class _Table:
    """A quarter, a quarter and half of 80 items for trials, and 80 held out, of which 20 take a second."""

    waves = (0, 1, 2)

    def count(self, waves: Sequence[int]) -> int:
        return sum({0: 20, 1: 20, 2: 40, -1: 80}[wave] for wave in waves)

    def pace(self, keys: Sequence[str]) -> float:
        assert keys == ["base"]
        return 0.05


class _Bench:
    table = _Table()

    def score(self, model: Model, waves: Sequence[int]) -> None:
        assert (model.key, waves) == ("base", [0])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("merganser.search.auto.budget.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("seconds", "kept", "told"), [(80, 3, False), (79, 2, False), (39, 1, False), (19, 1, True)])
def test_how_many_items_fit_into_the_minutes(seconds: float, kept: int, told: bool) -> None:
    # three models, the winner and the average on 160 items take 40 seconds: half of 80
    models = [Model(name, name, name) for name in ("base", "calm", "cool")]
    waves, note = keep_waves(_Bench(), models, seconds / 60)  # type: ignore[arg-type]
    assert waves == kept
    assert (note is not None) == told


def test_what_may_still_begin(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(_Bench(), 200.0, 0.05, 5)  # type: ignore[arg-type]
    assert budget.proof == 20.0
    monkeypatch.setattr(Budget, "seconds", lambda _, recipe: float(recipe))
    # 80 seconds are left for trials, 52 of them for the portfolio
    assert budget.fits("52")
    assert not budget.fits("53")
    clock[0] = 150.0
    assert budget.fits("2")
    assert not budget.fits("3")
    assert budget.last_trial(10) == 170.0


def test_a_recipe_takes_what_its_plan_says_and_the_scoring() -> None:
    (first, *_) = candidates("base", ["calm", "cool"])
    budget = Budget(_Bench(), 0.0, 0.05, 5)  # type: ignore[arg-type]
    assert budget.seconds(first.recipe) > 4.0
    assert budget.seconds("merge_method: none") == 4.0
