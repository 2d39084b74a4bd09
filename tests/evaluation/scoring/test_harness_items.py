"""Items of lm-eval scored part by part: figures from their values, and the same figures as all at once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merganser.errors import TaskError
from merganser.evaluation import evaluate
from merganser.evaluation.scoring.harness_items import Metric, metrics_of
from merganser.search import search
from tests.evaluation.scoring.test_harness import files  # noqa: F401

CHANCE = np.random.default_rng(0)
LOGS, WEIGHTS = (-CHANCE.uniform(1, 3, 60)).tolist(), CHANCE.uniform(2, 8, 60).tolist()
MEAN, RATIO = sum(LOGS) / 60, sum(LOGS) / sum(WEIGHTS)


def aggregation(name: str, module: str = "lm_eval.api.metrics") -> Any:
    def found(items: Any) -> float:
        return 0.0

    found.__name__, found.__module__ = name, module
    return found


class Task:
    """What `metrics_of` asks of a task of lm-eval."""

    def higher_is_better(self) -> dict[str, bool]:
        return {"acc": True, "perplexity": False}

    def aggregation(self) -> dict[str, Any]:
        own = {"f1": aggregation("f1_score"), "mine": aggregation("mean", "utils")}
        return {**own, "perplexity": aggregation("perplexity"), "acc": aggregation("mean")}

    def dump_config(self) -> dict[str, Any]:
        return {"filter_list": [{"name": "strict"}, {"name": "none"}]}


def test_which_metrics_follow_from_values_of_items() -> None:
    found = metrics_of(Task(), ["acc", "f1", "perplexity"])
    assert [(m.name, m.key, m.filter, m.aggregation, m.higher) for m in found] == [
        ("acc,strict", "acc", "strict", "mean", True),
        ("acc", "acc", "none", "mean", True),
        ("perplexity,strict", "perplexity", "strict", "perplexity", False),
        ("perplexity", "perplexity", "none", "perplexity", False),
    ]


@pytest.mark.parametrize(
    ("aggregation", "weights", "value"),
    [
        ("mean", None, MEAN),
        ("perplexity", None, math.exp(-MEAN)),
        ("weighted_perplexity", WEIGHTS, math.exp(-RATIO)),
        ("bits_per_byte", WEIGHTS, -RATIO / math.log(2)),
    ],
)
def test_figures_and_their_errors(aggregation: str, weights: list[float] | None, value: float) -> None:
    metric = Metric("m", "m", "none", aggregation, aggregation == "mean")
    columns = {"m": LOGS} | ({} if weights is None else {"m weight": weights})
    found = metric.estimate(columns, "items")
    assert found.value == pytest.approx(value)
    # the error against a jackknife of the figure itself
    parts = []
    for left in range(60):
        kept = {name: [v for i, v in enumerate(column) if i != left] for name, column in columns.items()}
        parts.append(metric.estimate(kept, "items").value)
    jackknife = math.sqrt(59 / 60 * sum((part - np.mean(parts)) ** 2 for part in parts))
    assert found.stderr == pytest.approx(jackknife, rel=0.02)
    assert metric.rising


def test_scores_of_items() -> None:
    right = Metric("acc", "acc", "none", "mean", True)
    assert right.scores({"acc": [1, 0]}) == [1, 0]
    wrong = Metric("brier", "brier", "none", "mean", False)
    assert wrong.scores({"brier": [0.0, 1.0]}) == [1.0, math.exp(-1)]
    assert not wrong.rising
    likely = Metric("m", "m", "none", "bits_per_byte", False)
    assert likely.scores({"m": [-2.0, -4.0], "m weight": [2.0, 8.0]}) == [math.exp(-1), math.exp(-0.5)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_search_scores_them_in_memory(zoo: Path, files: list[Path], tmp_path: Path) -> None:  # noqa: F811
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(zoo / "a")}, {"model": str(zoo / "b")}],
        "parameters": {"weight": {"search": [0, 1], "per": "model"}},
    }
    given: dict[str, Any] = {"trials": 2, "sampler": "random", "dtype": "float32", "limit": 18}
    objective = ["quiz/acc", "text/bits_per_byte"]
    found = search(recipe, tmp_path / "out", files, objectives=objective, **given)
    assert all(trial.failed is None for trial in found.trials)
    assert found.held_out == 18
    assert not (tmp_path / "out" / "scratch").exists()
    # the values of the items are those of lm-eval on all of them at once
    (end,) = [end for end in found.ends if end.name == "a"]
    assert end.values is not None
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    own = {e["task"]: e["content"] for e in lines if e.get("model") == "a" and e["batch"] == -1}
    whole = evaluate([zoo / "a"], files, limit=18, dtype="float32")
    for metric in ("acc", "acc_norm"):
        every = whole.items("a", "quiz")[metric]
        assert own["quiz"]["columns"][metric] == [every[item] for item in own["quiz"]["items"]]
    assert end.values[0].value == pytest.approx(np.mean(own["quiz"]["columns"]["acc"]))
    # continued: nothing is scored again; with other arguments it is refused
    before = (tmp_path / "out" / "items.jsonl").read_bytes()
    search(recipe, tmp_path / "out", files, objectives=objective, **given)
    assert (tmp_path / "out" / "items.jsonl").read_bytes() == before
    with pytest.raises(Exception, match="begun with another"):
        search(recipe, tmp_path / "out", files, objectives=objective, lm_eval={"num_fewshot": 1}, **given)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_figure_of_a_part(zoo: Path, files: list[Path], tmp_path: Path) -> None:  # noqa: F811
    task = tmp_path / "f1.yaml"
    task.write_text((tmp_path / "quiz.yaml").read_text().replace("own_quiz", "own_f1").partition("metric_list")[0])
    with task.open("a") as file:
        file.write("metric_list:\n  - {metric: f1, aggregation: f1, higher_is_better: true}\n")
    recipe = {"merge_method": "linear", "models": [{"model": str(zoo / "a")}, {"model": str(zoo / "b")}]}
    recipe["parameters"] = {"weight": {"search": [0, 1], "per": "model"}}  # type: ignore[assignment]
    with pytest.raises(TaskError, match=r"f1\.yaml: none of its metrics \(f1\) is a mean over its items"):
        search(recipe, tmp_path / "out", [task])


def test_without_lm_eval(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    (tmp_path / "quiz.yaml").write_text("task: quiz\n")
    recipe = {"merge_method": "linear", "models": [{"model": str(zoo / "a")}, {"model": str(zoo / "b")}]}
    recipe["parameters"] = {"weight": {"search": [0, 1], "per": "model"}}  # type: ignore[assignment]
    with pytest.raises(TaskError, match=r"quiz\.yaml: tasks in this format are run by lm-eval.* pip install"):
        search(recipe, tmp_path / "out", [tmp_path / "quiz.yaml"])
