"""Objectives from an external command: what it may print, and what a failing one is told."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.errors import TaskError
from merganser.search import Found, search
from merganser.search.scoring.bench import Failed
from merganser.search.scoring.command import parse_command, run_command
from tests.adapters.test_apply import write_adapter
from tests.search.conftest import RECIPE

# a quadratic in the weights of the merge, read from one element: the best is at weights of 0.25 and -0.5
SCORE = """\
import json, sys
import numpy as np
from safetensors.numpy import load_file
def w(p): return load_file(p + "/model.safetensors")["model.layers.0.self_attn.q_proj.weight"].astype(float).ravel()
base, a, b, m = (w(p) for p in ("base", "a", "b", sys.argv[1]))
x = np.linalg.lstsq(np.stack([a - base, b - base], 1), m - base, rcond=None)[0]
print("some words first")
print(json.dumps({"loss": (x[0] - 0.25) ** 2 + (x[1] + 0.5) ** 2, "sum": x.sum()}))
"""


def ran(tmp_path: Path, code: str, timeout: float = 20.0) -> Any:
    script = tmp_path / "score.py"
    script.write_text(code)
    return run_command([sys.executable, "-S", "-E", str(script), "{model}"], tmp_path, timeout, {"score": None})


@pytest.mark.parametrize(
    "code",
    ["print('{\"score\": 0.5}')", "print('words')\nprint('{\"score\": 0.5, \"other\": null}')", "print('{\\n\"score\":\\n0.5}')"],
)  # fmt: skip
def test_what_it_may_print(tmp_path: Path, code: str) -> None:
    assert ran(tmp_path, code)["score"].value == 0.5


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "the command printed nothing; it must print a JSON object of numbers"),
        ("import sys; sys.exit('no data')", "the command failed with code 1: no data"),
        ("import os; os.kill(os.getpid(), 9)", "the command failed with code -9"),
        ("print('fine')", "the command printed no JSON object, but 'fine'"),
        ("print('[1]')", "the command printed no JSON object, but '[1]'"),
        ("print('{\"other\": 1}')", "the command gave no number for 'score'; it printed other"),
        ('print(\'{"score": "high"}\')', "the command gave no number for 'score'"),
        ("print('{\"score\": true}')", "the command gave no number for 'score'"),
        ("print('{\"score\": NaN}')", "the command gave nan for 'score', which is not a finite number"),
        ("print('{\"score\": -Infinity}')", "the command gave -inf for 'score', which is not a finite number"),
        ("print('[' * 100000)", "the command printed no JSON object"),
    ],
)
def test_what_is_told(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(Failed) as caught:
        ran(tmp_path, code)
    assert message in str(caught.value)


def test_one_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "late"
    late = f"import time; time.sleep(1.2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-S', '-c', {late!r}])\ntime.sleep(60)\n"
    with pytest.raises(Failed, match=r"took longer than 0\.5 seconds, and was ended"):
        ran(tmp_path, code, 0.5)
    time.sleep(1.5)
    assert not mark.exists()


def test_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"the command cannot be started: \./no-such-program: No such file"):
        run_command(["./no-such-program", "{model}"], tmp_path, 1, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "command: is empty"),
        ("score 'model", 'command: "score \'model" cannot be read: No closing quotation'),
        ("score model", "has no {model}, where the folder of the merged model is put"),
    ],
)
def test_commands_that_are_none(text: str, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        parse_command(text)
    assert message in str(caught.value)


def searched(out: Path, command: str, **options: Any) -> Found:
    return search(RECIPE, out, command=command, **{"objectives": ["loss:minimize"], "sampler": "random", **options})


def test_a_quadratic(tmp_path: Path, made: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    found = searched(tmp_path / "out", f"{sys.executable} {script} {{model}}", trials=2)
    for trial in found.trials:
        x, y = trial.settings.values()
        assert trial.values is not None
        assert trial.values[0] == pytest.approx((x - 0.25) ** 2 + (y + 0.5) ** 2, abs=1e-4)
    assert found.held_out == 0
    assert [end.name for end in found.ends] == [found.front[0].name, "base", "a", "b", "average"]
    assert [end.values and round(end.values[0].value, 4) for end in found.ends[1:]] == [0.3125, 0.8125, 2.3125, 1.0625]
    # nothing is left of the merges
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "items.jsonl", "recipes", "result.json", "search.json", "trials.log", "winner.yaml"
    ]  # fmt: skip


def test_models_that_are_no_folders_are_measured_too(tmp_path: Path, made: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text("import json, sys\nprint(json.dumps({'loss': len(sys.argv[1])}))\n")
    tensors = {
        f"model.layers.0.self_attn.q_proj.lora_{k}.weight": torch.ones(shape)
        for k, shape in (("A", (1, 32)), ("B", (32, 1)))
    }
    write_adapter(tmp_path / "thin", tensors, r=1, lora_alpha=1, target_modules=["q_proj"])
    recipe = RECIPE.replace("model: b}", f"model: base+{tmp_path}/thin}}")
    command = f"{sys.executable} {script} {{model}}"
    found = search(recipe, tmp_path / "out", command=command, objectives=["loss:minimize"], trials=1)
    assert [(end.name, end.failed) for end in found.ends[1:]] == [
        (name, None) for name in ("base", "a", "thin", "average")
    ]


def test_trials_that_all_fail_end_the_search(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="the first 5 trials failed, so the search ends; the last: the command cannot"):
        searched(tmp_path / "out", "./no-such-program {model}")
