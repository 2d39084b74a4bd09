"""A base, two experts of random words, and tasks on which they differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.evaluation.tiny import make_model, text


def make_calmer(root: Path, name: str, factors: Mapping[str, float]) -> None:
    """Write an expert: the base with smaller logits, which predicts random words better."""
    shutil.copytree(root / "base", root / name)
    weights = load_file(root / "base" / "model.safetensors")
    changed = {key: tensor * factors.get(key, 1.0) for key, tensor in weights.items()}
    save_file(changed, root / name / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("search")
    make_model(root / "base", 0)
    make_model(root / "a", 1, like=root / "base")
    make_model(root / "b", 2, like=root / "base")
    make_calmer(root, "calm", {"lm_head.weight": 0.6})
    make_calmer(root, "cool", {"model.norm.weight": 0.6})
    make_calmer(root, "broken", {"lm_head.weight": float("nan")})
    for seed, name in enumerate(("one", "two")):
        lines = [json.dumps({"text": text(100 * seed + i, 12)}) for i in range(40)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    quiz = [{"context": text(i, 6).strip(), "choices": [" cat", " on a mat"], "gold": i % 2} for i in range(12)]
    (root / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in quiz))
    return root


@pytest.fixture(autouse=True)
def _here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # packing plotly takes seconds; tests of the report do
    monkeypatch.setattr("merganser.report.page._packed_plotly", lambda _: "")


RECIPE = """\
merge_method: task_arithmetic
base_model: base
models: [{model: a}, {model: b}]
parameters:
  weight: {search: [-1, 1], per: model}
"""
