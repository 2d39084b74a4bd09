"""`merganser auto`: the portfolio, the search around its best, the held-out test, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from merganser.errors import MergeError, TaskError
from merganser.evaluation.scoring.estimate import Estimate
from merganser.recipe import check_recipe, load_recipe
from merganser.search.auto import Choice, Interrupted, auto
from merganser.search.auto import run as auto_run
from merganser.search.auto.begin import fields_of, notes_of_same, notes_of_useless
from merganser.search.auto.budget import Budget, keep_waves
from merganser.search.auto.outcome import Above, recommend
from merganser.search.auto.portfolio import around, candidates, plain_around
from merganser.search.ends import End
from merganser.search.scoring.bench import Model
from merganser.search.scoring.objectives import Objective
from merganser.search.space.space import Space
from merganser.search.trials import Silent, Trial
from tests.cli.tiny import run

RECOVERED = Objective("recovered/mean", ((1.0, "recovered/mean"),), "maximize")
SHORT = ("linear", "regmean", "featcal-wudi", "ties", "task_arithmetic-1")
"""Without data there is no regmean, and no featcal."""


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
        recipe, value = around(candidate)
        space = Space(recipe)
        check_recipe(load_recipe(space.resolve(space.start())))
        # the search begins where the candidate is, in the middle of each range
        own = candidate.parameters.get("weight", 1.0)
        assert value == (own if "weight" in space.dimensions[0].name else candidate.parameters["lambda"])
        assert {(d.low, d.high) for d in space.dimensions} == {(0.5 * value, 1.5 * value)}
        assert len(space.dimensions) == 6
    # statistics that are measured within a merge are of that merge alone
    homes = {each.name: each.about.get("keep_statistics") for each in listed}
    within = {name for name in homes if name.startswith(("featcal", "regmean_plus"))}
    assert {homes[name] for name in within} == {f"/kept/{name}" for name in within}
    assert {home for name, home in homes.items() if name not in within} <= {None, "/kept"}
    for each in listed:
        kept_around = {"keep_statistics" in recipe for recipe in (around(each)[0], plain_around(each))}
        assert kept_around == {"keep_statistics" in each.recipe and each.name not in within}


@pytest.mark.usefixtures("short")
def test_it_finds_merges_and_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    found = made_best(out)
    assert set(found.domains) == {"one", "two"}
    assert [tried.name for tried in found.tried] == ["linear", "ties", "task_arithmetic-1"]
    # trials around a recipe are called after it, and begin at it
    assert [t.name for t in found.around] == [f"{found.around[0].name[:-1]}{i}" for i in (1, 2, 3)]
    near = next(tried for tried in found.tried if found.around[0].name == f"{tried.name}-trial-0001")
    assert found.around[0].values == (pytest.approx(near.value, abs=1e-6),)
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
    (out / "merged" / "mine.txt").unlink()
    # what was merged before and is no longer recommended does not stay
    monkeypatch.setattr(auto_run, "recommend", lambda *_: "calm")
    other = made_best(out)
    assert (other.recommended, other.merged) == ("calm", None)
    assert "the folder merged of an earlier call is no longer recommended, and was removed" in other.notes
    assert not (out / "merged").exists()


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
        (("base", "calm", "out", "--tasks", "one.jsonl"), "auto: merges two or more experts of one base, got 1 (calm; "),
        (("base", "calm", "calm", "out", "--tasks", "one.jsonl"), "auto: calm is listed twice among the experts; leave one out"),
        (("base", "base", "calm", "out", "--tasks", "one.jsonl"), "auto: base is the base, and is listed among the experts, too"),
        (("base", "calm", "broken", "out", "--tasks", "one.jsonl", "--limit", "16"), "error: broken, one: NaN or infinity in the logits, at item"),
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
        "auto", "base", "calm", "cool", out, "--tasks", "one.jsonl", "two.jsonl", "--minutes", 0.00001, "--limit", 24, "--dtype", "float32"
    )  # fmt: skip
    assert found.code == 0, found.err
    lines = found.out.splitlines()
    # the base was scored before, to know how long an item takes
    assert lines[:2] == ["measuring calm", "measuring cool"]
    assert lines[2].startswith("recipe 1/3  linear  ")
    assert "note: not tried, for lack of time: ties, task_arithmetic-1; more --minutes try them" in found.err
    start = lines.index("1 recipe")
    assert lines[start + 1] == "the winner is linear, the average, chosen from 1 recipe"
    start += 1
    assert lines[start + 1].startswith(
        "share of the gain of the best model of each task over the base that is kept: one ("
    )
    assert lines[start + 2] == "measured on 6 items that nothing was chosen on (± standard error)"
    head = ["model", "kept, mean", "kept, worst task", "the winner keeps more by (95 % interval)"]
    assert re.split("  +", lines[start + 3].strip()) == head
    assert "note: a quarter of the items is scored, since all would take more than half of the minutes" in found.err
    assert "note: scoring 5 models takes about 0 minutes of the 1e-05 even on a part of the items" in found.err
    assert [line.split()[0] for line in lines[start + 4 : start + 8]] == ["winner", "base", "calm", "cool"]
    single = lines[start + 8].partition(",")[0].removeprefix("significantly worse than ")
    assert lines[start + 8 :] == [
        f"significantly worse than {single}, the best single model (95 % interval): take that instead",
        f"take {single} as it is: nothing that was tried is better; nothing was merged",
        f"wrote {out / 'report.html'}; open it in a browser",
    ]
    assert "a merge with a sidecar gives each model back: merge_method: skillpack, and merganser restore" in found.err
    text = " ".join(run("report", out, "--text").out.split())
    assert "1 recipe · auto · " in text
    assert f"Take {single} as it is: linear, chosen from 1 recipe, is worse, so nothing was merged." in text
    assert single in ("calm", "cool")
    assert not (out / "merged").exists()
    assert yaml.safe_load((out / "winner.yaml").read_text())["merge_method"] == "linear"


@pytest.mark.usefixtures("short")
def test_texts_alone_are_calibrated_on_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_run.Budget, "fits", lambda _, recipe: "data" in recipe)
    search_around = auto_run._Search.try_around

    def around_featcal(self: Any) -> None:
        # other factors are another merge, within which its statistics are measured again
        self.best_candidate = next(each for each in self._listed if each.method == "featcal")
        search_around(self)

    monkeypatch.setattr(auto_run._Search, "try_around", around_featcal)
    out = tmp_path / "out"
    data = {"calm": "one.jsonl", "cool": "two.jsonl"}
    found = auto("base", ["calm", "cool"], out, data=data, minutes=0.2, limit=16, dtype="float32")
    assert [tried.name for tried in found.tried] == ["linear", "regmean", "featcal-wudi"]
    assert all(each.failed is None for each in (*found.tried, *found.around))
    assert [trial.name for trial in found.around] == [f"featcal-wudi-trial-000{i}" for i in (1, 2, 3)]
    assert set(found.domains) == {"calm", "cool"}
    assert {path.name for path in (out / "statistics").iterdir()} == {"calm", "cool", "featcal-wudi"}
    # the first half of the documents is calibrated on, the second one scored
    whole = Path("one.jsonl").read_text()
    halves = [(out / "texts" / name).read_text() for name in ("calibrate-calm.jsonl", "calm.jsonl")]
    assert "".join(halves) == whole
    assert [half.count("\n") for half in halves] == [20, 20]


class Stop(Silent):
    """Presses Ctrl-C after a recipe, and keeps what it is told."""

    def __init__(self, at: str | None = None) -> None:
        self.at, self.bests, self.notes = at, list[str | None](), list[str]()

    def over(self, trial: Trial, best: Trial | None) -> None:
        self.bests.append(None if best is None else best.name)
        if trial.name == self.at:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.usefixtures("short")
def test_trials_that_fail_do_not_end_it_and_ctrl_c_says_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted) as caught:
        made_best(tmp_path / "out", progress=Stop("ties"), limit=8)
    assert caught.value.best is not None
    assert re.fullmatch(
        rf"(linear|ties), which keeps \d\.\d+ on the items of trials: {tmp_path}/out/recipes/\1\.yaml",
        caught.value.best,
    )

    def failing(*_: Any) -> None:
        raise TaskError("the first 5 trials failed, so the search ends; the last: why")

    monkeypatch.setattr(auto_run.Trials, "run", failing)
    found = made_best(tmp_path / "out", limit=8)
    assert found.ends[0].values is not None
    assert [note for note in found.notes if "the first 5 trials failed, so the search ends; the last: why" in note]


def test_experts_that_are_alike_or_best_at_nothing() -> None:
    base, calm, twin, cool = (
        Model(key, name, name) for key, name in (("0", "base"), ("1", "calm"), ("1", "twin"), ("2", "cool"))
    )
    assert notes_of_same([base, calm, cool]) == []
    assert notes_of_same([base, calm, twin]) == [
        "twin has the weights of calm, and counts in every merge; leave it out"
    ]
    assert notes_of_same([base, calm, replace(cool, key="0")]) == [
        "cool has the weights of base, the base, and counts in every merge; leave it out"
    ]
    with pytest.raises(
        MergeError, match="all experts have the weights of base, the base, so there is nothing to merge"
    ):
        notes_of_same([base, replace(calm, key="0"), replace(cool, key="0")])
    assert notes_of_useless([base, calm, twin, cool], {"one": "calm"}) == [
        "cool is the best at no task, so nothing of its own is measured, and merges may lose it: give a task of its field, "
        "or leave it out"
    ]


def test_a_task_on_which_a_model_gains_little_beside_its_own_is_no_field() -> None:
    base, maths, code = (Model(name, name, Path(name)) for name in ("base", "maths", "code"))
    bits = {  # maths gains 20 % on its own task and 3.9 % on novels, code 4 % on its own, which no other task outdoes
        "base": {"sums": 1.0, "novels": 2.0, "programs": 1.0},
        "maths": {"sums": 0.8, "novels": 1.922, "programs": 1.1},
        "code": {"sums": 1.0, "novels": 2.0, "programs": 0.96},
    }
    figures = {
        name: {f"{task}/bits": Estimate(value, 0.01) for task, value in own.items()}
        | {"quiz/accuracy": Estimate(0.5 + (0.1 if name == "maths" else 0), 0.01)}
        for name, own in bits.items()
    }
    best = {"sums": maths, "novels": maths, "programs": code, "quiz": maths}
    mains = {**dict.fromkeys(("sums", "novels", "programs"), ("bits", False)), "quiz": ("accuracy", True)}
    fields, notes = fields_of(best, base, figures, mains)
    assert fields == {"sums": maths, "programs": code, "quiz": maths}
    assert notes == ["novels does not count as a domain: maths, the best at it, gains 3.9% there and 20.0% at sums"]
    figures["maths"]["novels/bits"] = Estimate(1.55, 0.01)
    assert fields_of(best, base, figures, mains) == (best, [])


def test_a_trial_around_is_the_best_only_if_it_is_better_than_the_recipes() -> None:
    told = Stop()
    trial = Trial(0, {}, "", (0.5,), (None,), True, 1, False, None, None, 0.0)
    for least in (0.4, 0.5):
        Above(told, least).over(trial, trial)
    assert told.bests == ["trial-0001", None]


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

    def load(self, model: Model) -> None:
        assert model.key == "base"

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
    assert budget.testing == 20.0
    monkeypatch.setattr(Budget, "seconds", lambda _, recipe: float(recipe))
    # 80 seconds are left for trials, 52 of them for the portfolio
    assert budget.fits("52")
    assert not budget.fits("53")
    clock[0] = 150.0
    assert budget.fits("2")
    assert not budget.fits("3")
    assert budget.last_trial(10) == 170.0
    # the winner is merged after the held-out test
    assert budget.last_trial(10, 5) == 165.0


def test_a_recipe_takes_what_its_plan_says_and_the_scoring() -> None:
    (first, *_) = candidates("base", ["calm", "cool"])
    budget = Budget(_Bench(), 0.0, 0.05, 5)  # type: ignore[arg-type]
    assert budget.seconds(first.recipe) > 4.0
    assert budget.seconds("merge_method: none") == 4.0
