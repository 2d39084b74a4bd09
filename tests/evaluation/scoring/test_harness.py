"""Tasks of lm-eval: the same figures as its own command, and what is said where it is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from merganser.errors import TaskError
from merganser.evaluation import evaluate
from merganser.evaluation.scoring.harness import Harness, _content, _metrics, outcome
from merganser.evaluation.scoring.tasks import HarnessTask, load_tasks
from tests.evaluation.tiny import text

CHOICES = """
task: own_quiz
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: own_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{context}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    lines = [{"context": text(i, 6).strip(), "choices": ["cat", "on a mat", "x = 1"], "gold": i % 3} for i in range(20)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, template in (("quiz", CHOICES), ("text", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(template.format(data=data))
    return [tmp_path / "quiz.yaml", tmp_path / "text.yaml"]


def command(model: Path, files: list[Path], out: Path) -> dict[str, Any]:
    """The results of lm-eval's own command."""
    arguments = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
    arguments += ["--batch_size", "8", "--limit", "15", "--output_path", out, "--tasks", *files]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *map(str, arguments)], check=True, env=environment, capture_output=True
    )
    [file] = out.rglob("results*.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_same_figures_as_the_command(zoo: Path, files: list[Path], tmp_path: Path) -> None:
    found = evaluate([zoo / "a"], files, base=zoo / "base", limit=15, dtype="float32", json=tmp_path / "out.json")
    expected = command(zoo / "a", files, tmp_path / "theirs")
    quiz, rolling = found.outcomes["a"]["quiz"], found.outcomes["a"]["text"]
    for metric in ("acc", "acc_norm"):
        assert quiz.metrics[metric].value == expected["own_quiz"][f"{metric},none"]
        assert quiz.metrics[metric].stderr == pytest.approx(expected["own_quiz"][f"{metric}_stderr,none"], rel=1e-12)
        assert len(quiz.columns[metric]) == 15
    assert rolling.metrics["bits_per_byte"].value == expected["own_text"]["bits_per_byte,none"]
    assert rolling.metrics["bits_per_byte"].stderr is None
    assert found.tasks["quiz"].metrics == ("acc", "acc_norm")
    assert not found.tasks["text"].higher_is_better
    assert found.to_json()["differences"]["models"]["a"]["quiz"]["paired"]
    again = evaluate([zoo / "a"], files, base=zoo / "base", limit=15, dtype="float32", json=tmp_path / "out.json")
    assert again.models["a"].parameters is None
    assert again.to_json()["results"] == found.to_json()["results"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_names_that_lm_eval_does_not_know(zoo: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(
        TaskError, match=r"arc_esy: no such file, and lm-eval has no task of that name\. Did you mean 'arc"
    ):
        evaluate([zoo / "a"], ["arc_esy"])
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\noutput_type: nonsense\n")
    with pytest.raises(TaskError, match=r"bad\.yaml: lm-eval cannot run it: "):
        evaluate([zoo / "a"], [tmp_path / "bad.yaml"])


def test_without_lm_eval(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quiz.yaml").write_text("task: quiz\n")
    with pytest.raises(
        TaskError, match=r"quiz\.yaml: tasks in this format are run by lm-eval.* pip install 'merganser\[eval\]'"
    ):
        evaluate([zoo / "a"], ["quiz.yaml"])
    with pytest.raises(
        TaskError, match=r"quiz\.yam: no such file\. Did you mean 'quiz\.yaml'\? If lm-eval has .* pip install"
    ):
        evaluate([zoo / "a"], ["quiz.yam"])
    with pytest.raises(TaskError, match=r"own: no such file\. If lm-eval has a task"):
        Harness([task for task in load_tasks(["own"]) if isinstance(task, HarnessTask)])


SCORED = {
    "alias": "quiz",
    "acc,none": 0.75,
    "acc_stderr,none": 0.25,
    "exact_match,strict": 0.5,
    "exact_match_stderr,strict": "N/A",
    "bits,none": 3.0,
    "bits_stderr,none": 0.5,
    "sample_len": 4,
}
SAMPLES = [
    {"filter": name, "acc": acc, "exact_match": acc, "bits": (1.0, 2), "resps": [[(-1.0, False)]]}
    for acc in (1, 1, 0, 1)
    for name in ("none", "strict")
]


def test_metrics_of_lm_eval() -> None:
    acc, match, bits = _metrics(SCORED, {"bits": False, "acc": True}, SAMPLES)
    assert acc == {"name": "acc", "value": 0.75, "stderr": 0.25, "higher_is_better": True, "items": [1, 1, 0, 1]}
    # its figure is not the mean of the items, so these are not taken for it
    assert match["name"] == "exact_match,strict"
    assert (match["stderr"], match["items"]) == (None, None)
    assert (bits["higher_is_better"], bits["items"]) == (False, None)
    found = outcome({"metrics": [acc, match, bits], "items": 4}, "quiz", "a")
    other = outcome({"metrics": [acc, match, bits], "items": 4}, "quiz", "b")
    assert found.metrics["acc"].stderr == pytest.approx(0.25)
    assert (found.metrics["acc"] - other.metrics["acc"]).stderr == 0
    assert found.metrics["bits"].stderr == 0.5
    assert (found.metrics["bits"] - other.metrics["bits"]).stderr == pytest.approx(0.5 * 2**0.5)
    assert found.metrics["exact_match,strict"].stderr is None


def test_nan_in_lm_eval() -> None:
    class Opened:
        key, parts, metrics = "quiz", ("quiz",), ("acc",)

    found: dict[str, Any] = {"samples": {"quiz": SAMPLES}, "results": {"quiz": SCORED}, "higher_is_better": {}}
    found["n-samples"] = {"quiz": {"effective": 4}}
    task = HarnessTask("quiz", "quiz", "")
    assert _content(task, Opened, found)["items"] == 4  # type: ignore[arg-type]
    broken = [*SAMPLES, {"resps": [[(float("nan"), False)]]}]
    found["samples"] = {"quiz": broken}
    assert _content(task, Opened, found) == {"failed": "NaN in what lm-eval got from the model"}  # type: ignore[arg-type]
