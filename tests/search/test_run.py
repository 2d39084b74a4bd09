"""Searches on tiny models: what is tried, ended early, continued, and proved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from merganser.engine.merge import merge
from merganser.errors import MergeError
from merganser.evaluation import evaluate
from merganser.evaluation.scoring.estimate import Estimate
from merganser.inference.language_model import LanguageModel, Reused
from merganser.search import Found, Interrupted, search
from merganser.search.scoring.judge import hopeless
from merganser.search.trials import Silent, Trial
from tests.making import assert_equal, read_model
from tests.search.conftest import RECIPE

TASKS = ["one.jsonl", "two.jsonl", "quiz.jsonl"]
OBJECTIVE = ["0.5*one/bits_per_byte+0.5*two/bits_per_byte"]


def searched(out: Path, tasks: list[str] = TASKS[:2], recipe: Any = RECIPE, **options: Any) -> Found:
    return search(recipe, out, tasks, **{"trials": 6, "sampler": "random", "dtype": "float32", **options})


def table(out: Path) -> list[Any]:
    """Every line of the table, without the order in which they were written."""
    lines = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    return sorted((str(line.get("key")), line.get("batch"), str(line.get("content"))) for line in lines)


def figures(found: Found) -> list[Any]:
    return [(t.number, t.settings, t.values, t.stderr, t.items, t.stopped, t.same_as) for t in found.trials]


def test_the_winner_is_a_plain_recipe_with_the_figures_of_eval(tmp_path: Path) -> None:
    found = searched(tmp_path / "out", early_stopping=False)
    best = found.best
    assert best is not None
    assert best.values == min(trial.values for trial in found.trials if trial.values)
    recipe = yaml.safe_load((tmp_path / "out" / "winner.yaml").read_text())
    assert [m["parameters"]["weight"] for m in recipe["models"]] == [*best.settings.values()]
    # trials over whose weights others were written, against each model loaded by itself
    names = ["trial-0002", "trial-0005", best.name]
    files = [f"{name}={tmp_path}/out/recipes/{name}.yaml" for name in dict.fromkeys(names)]
    whole = evaluate(files, TASKS[:2], dtype="float32")
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    for name in names:
        for task in ("one", "two"):
            own = [each["content"] for each in lines if each.get("model") == name and each.get("task") == task]
            bits = {item: b for c in own for item, b in zip(c["items"], c["columns"]["bits"], strict=True)}
            expected = whole.items(name, task)["bits"]
            assert len(bits) == (40 if name == best.name else 20)
            for item, value in bits.items():
                assert value == pytest.approx(expected[item], rel=1e-5)
    held = [end.values[0].value for end in found.ends if end.values]
    assert len(held) == len(found.ends) == 5
    assert [end.name for end in found.ends[1:]] == ["base", "a", "b", "average"]


def test_trials_have_the_weights_that_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, load = {}, Reused.load

    def keeping(self: Reused, opened: LanguageModel, *given: Any) -> Any:
        model = load(self, opened, *given)
        weights[Path(opened.source.reference).name] = {n: p.detach().clone() for n, p in model.named_parameters()}
        return model

    monkeypatch.setattr(Reused, "load", keeping)
    searched(tmp_path / "out", trials=3)
    for name in ("trial-0001.yaml", "trial-0002.yaml", "trial-0003.yaml"):
        written = read_model(merge(tmp_path / "out" / "recipes" / name, tmp_path / name).out)
        assert_equal(weights[name], written)


def test_the_halves_share_no_item(tmp_path: Path) -> None:
    searched(tmp_path / "out", TASKS, objectives=["quiz/accuracy"], trials=1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    by_wave = {(e["task"], e["batch"]): e["content"]["items"] for e in lines if e.get("model") == "trial-0001"}
    for task, count in (("one", 40), ("two", 40), ("quiz", 12)):
        tried = [item for (name, wave), items in by_wave.items() if name == task and wave >= 0 for item in items]
        assert sorted([*tried, *by_wave[task, -1]]) == [*range(count)]
        assert len(tried) == count / 2


class Stop(Silent):
    """Ends a search as a kill does: without a word, at a trial."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error = at, error

    def over(self, trial: Trial, best: Trial | None) -> None:
        if trial.number == self.at:
            raise self.error


@pytest.mark.parametrize("sampler", ["tpe", "cma"])
def test_killed_between_trials_and_continued(tmp_path: Path, sampler: str) -> None:
    whole = searched(tmp_path / "whole", sampler=sampler, trials=5, limit=16)
    for at in (0, 3):
        with pytest.raises(ZeroDivisionError):
            searched(tmp_path / "cut", sampler=sampler, trials=5, limit=16, progress=Stop(at, ZeroDivisionError))
    again = searched(tmp_path / "cut", sampler=sampler, trials=5, limit=16)
    assert figures(again) == figures(whole)
    assert table(tmp_path / "cut") == table(tmp_path / "whole")


def test_killed_within_a_trial_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merganser.search.scoring.items import Table

    whole = searched(tmp_path / "whole", sampler="tpe", limit=16)
    add, left = Table.add, [9]

    def failing(self: Table, *given: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise ZeroDivisionError
        add(self, *given)

    monkeypatch.setattr(Table, "add", failing)
    for scored in (9, 9):
        left[0] = scored
        with pytest.raises(ZeroDivisionError):
            searched(tmp_path / "cut", sampler="tpe", limit=16)
    # half a line in either journal
    for name in ("items.jsonl", "trials.log"):
        with (tmp_path / "cut" / name).open("a") as file:
            file.write('{"check": "')
    left[0] = 10**9
    again = searched(tmp_path / "cut", sampler="tpe", limit=16)
    assert figures(again) == figures(whole)
    assert table(tmp_path / "cut") == table(tmp_path / "whole")


def test_a_continued_search_has_its_hours_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("merganser.search.run.time.monotonic", lambda: now[0])

    class Slow(Silent):
        """Half an hour for each trial."""

        def over(self, trial: Trial, best: Trial | None) -> None:
            now[0] += 1800

    given: dict[str, Any] = {"trials": None, "hours": 1, "limit": 8, "progress": Slow()}
    assert len(searched(tmp_path / "out", **given).trials) == 2
    assert len(searched(tmp_path / "out", **given).trials) == 4


def test_what_was_spent_on_a_trial_that_was_stopped_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        searched(tmp_path / "out", limit=8, trials=1, progress=Stop(0, ZeroDivisionError))
    (tmp_path / "out" / "trials.log").unlink()
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    spent = sum(line["seconds"] for line in lines if line.get("model") == "trial-0001")
    (trial,) = searched(tmp_path / "out", limit=8, trials=1).trials
    assert trial.seconds >= round(spent, 3) > 0


def test_interrupted(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        searched(tmp_path / "out", progress=Stop(3, KeyboardInterrupt))
    assert len(caught.value.found.trials) == 4
    assert caught.value.found.best is not None
    assert (tmp_path / "out" / "winner.yaml").exists()
    assert len(searched(tmp_path / "out", trials=5).trials) == 5


def test_hopeless_trials_end_early(tmp_path: Path) -> None:
    wide = RECIPE.replace("[-1, 1]", "[-60, 1]")
    ended = searched(tmp_path / "ended", recipe=wide, trials=8)
    whole = searched(tmp_path / "whole", recipe=wide, trials=8, early_stopping=False)
    assert any(trial.stopped and trial.items < 40 for trial in ended.trials)
    assert ended.best is not None
    assert whole.best is not None
    assert ended.best.number == whole.best.number
    assert sum(t.items for t in ended.trials) <= 0.7 * sum(t.items for t in whole.trials)
    for own, other in zip(ended.trials, whole.trials, strict=True):
        assert own.values is not None
        assert other.values is not None
        # that of an ended trial is the best one's and the difference on the items of both
        assert own.values[0] == pytest.approx(other.values[0], rel=0.25)


@pytest.mark.parametrize(
    ("difference", "stderr", "items", "ends"),
    [(-2.5, 1.0, 40, True), (-1.0, 1.0, 40, False), (2.5, 1.0, 40, False), (-2.5, 1.0, 5, False), (-2.5, 0.0, 40, False)],
)  # fmt: skip
def test_the_test_of_hopeless_trials(difference: float, stderr: float, items: int, ends: bool) -> None:
    assert hopeless(Estimate.of_error(difference, stderr, "key"), items) is ends


def test_one_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], LanguageModel.load

    def counting(self: LanguageModel, tensors: Mapping[str, torch.Tensor], *given: Any) -> Any:
        loads.append(self.source.reference)
        return load(self, tensors, *given)

    monkeypatch.setattr(LanguageModel, "load", counting)
    searched(tmp_path / "out")
    assert len(loads) == 1


def test_equal_recipes_are_scored_once(tmp_path: Path) -> None:
    recipe = RECIPE.replace("search: [-1, 1], per: model", "choices: [0.25, 0.5]")
    found = searched(tmp_path / "out", recipe=recipe)
    assert [trial.same_as is None for trial in found.trials].count(True) == 2
    scored = [line for line in table(tmp_path / "out") if line[0].startswith("recipe")]
    assert len({key.partition("/")[0] for key, _, _ in scored}) == 3  # and the average
    for trial in found.trials:
        if trial.same_as is not None:
            assert trial.values == found.trials[trial.same_as].values


def test_retention_of_experts(tmp_path: Path) -> None:
    recipe = (
        RECIPE.replace("model: a}", "model: calm}").replace("model: b}", "model: cool}").replace("[-1, 1]", "[0, 1]")
    )
    experts = {"base": "base", "experts": ["one=calm", "quiz=cool"]}
    found = searched(tmp_path / "out", ["one.jsonl", "two.jsonl", "quiz.jsonl"], recipe, trials=2, **experts)
    # the quiz is guessed by all
    assert any(
        note.startswith("quiz does not count as a domain: cool does not beat the base by 2 standard errors")
        for note in found.notes
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]

    def bits_per_byte(model: str, task: str) -> float:
        own = [
            e["content"]["columns"] for e in lines if e.get("model") == model and e["task"] == task and e["batch"] >= 0
        ]
        return float(sum(sum(c["bits"]) for c in own) / sum(sum(c["bytes"]) for c in own))

    for trial in found.trials:
        base, own, expert = (bits_per_byte(name, "one") for name in ("base", trial.name, "calm"))
        assert trial.values == (pytest.approx((base - own) / (base - expert)),)
    forgotten = searched(
        tmp_path / "two", TASKS[:2], recipe, trials=1, base="base", experts=["one=calm"], objectives=["forgotten/mean"]
    )
    lines = [json.loads(line) for line in (tmp_path / "two" / "items.jsonl").read_text().splitlines()]
    base, own = bits_per_byte("base", "two"), bits_per_byte("trial-0001", "two")
    assert forgotten.trials[0].values == (pytest.approx((own - base) / base),)
    with pytest.raises(MergeError, match="none beats the base"):
        searched(tmp_path / "noise", base="base", experts=["one=a", "two=b"], limit=12)
    with pytest.raises(MergeError, match=r"'recovered/three' is not measured here.*Known: .*recovered/mean"):
        searched(
            tmp_path / "other", TASKS[:2], recipe, **experts | {"experts": ["one=calm"]}, objectives=["recovered/three"]
        )


def test_several_objectives_give_a_front(tmp_path: Path) -> None:
    wide = RECIPE.replace("[-1, 1]", "[-60, 1]")
    objectives = ["one/bits_per_byte", "two/bits_per_byte"]
    found = searched(tmp_path / "out", recipe=wide, objectives=objectives, sampler="nsga2")
    points = [trial.values for trial in found.front if trial.values]
    assert points
    for point in points:
        for trial in found.trials:
            assert trial.values is not None
            assert not (trial.values[0] < point[0] and trial.values[1] < point[1])
    # each has both figures on all items: what is hopeless in one objective may be the best in the other
    assert [(len(t.values or ()), t.items, t.stopped) for t in found.trials] == [(2, 40, False)] * 6
    assert not (tmp_path / "out" / "winner.yaml").exists()
    assert all(found.recipe_file(trial).exists() for trial in found.front)


def test_bounds(tmp_path: Path) -> None:
    found = searched(tmp_path / "free")
    values = sorted(trial.values[0] for trial in found.trials if trial.values)
    bound = f"{OBJECTIVE[0].partition('+')[0][4:]}={10 * values[0]}"
    assert searched(tmp_path / "kept", at_most=[bound], sampler="tpe").best is not None
    broken = searched(tmp_path / "broken", at_least=[bound], sampler="tpe")
    assert broken.best is None
    assert not any(trial.feasible for trial in broken.trials)
    assert not (tmp_path / "broken" / "winner.yaml").exists()


def test_a_bound_that_is_missed_on_the_items_held_out_is_told(tmp_path: Path) -> None:
    given: dict[str, Any] = {"trials": 1, "limit": 16, "sampler": "tpe"}
    free = searched(tmp_path / "free", TASKS[:1], **given)
    assert free.best is not None
    assert free.best.values is not None
    assert free.ends[0].values is not None
    tried, held = free.best.values[0], free.ends[0].values[0].value
    option = "at_most" if held > tried else "at_least"
    found = searched(tmp_path / "out", TASKS[:1], **given, **{option: [f"one/bits_per_byte={(held + tried) / 2}"]})
    assert found.best is not None
    assert found.notes == (
        f"trial-0001 misses a bound on the items held out: one/bits_per_byte {option.replace('_', ' ')} {(held + tried) / 2:g}, and "
        f"it has {held:.4g}",
    )


def test_a_trial_that_fails_is_told_and_the_search_goes_on(tmp_path: Path) -> None:
    # at float16 a weight of 1e6 overflows
    recipe = RECIPE.replace("search: [-1, 1], per: model", "choices: [0.5, 1000000]") + "dtype: float16\n"
    found = searched(tmp_path / "out", recipe=recipe, trials=5)
    failed = [trial for trial in found.trials if trial.failed]
    assert failed
    assert all("not finite" in str(trial.failed) or "NaN or infinity" in str(trial.failed) for trial in failed)
    assert found.best is not None
    assert found.best.settings == {"parameters.weight": 0.5}


def test_what_is_in_the_folder_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    searched(out, trials=1)
    (out / "mine.txt").write_text("mine")
    searched(out, trials=2)
    assert (out / "mine.txt").read_text() == "mine"
    shutil.rmtree(out)
