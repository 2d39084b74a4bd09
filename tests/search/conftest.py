"""A base, two experts of random words, and tasks on which they differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluation.tiny import make_model, text


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("search")
    make_model(root / "base", 0)
    make_model(root / "a", 1, like=root / "base")
    make_model(root / "b", 2, like=root / "base")
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


RECIPE = """\
merge_method: task_arithmetic
base_model: base
models: [{model: a}, {model: b}]
parameters:
  weight: {search: [-1, 1], per: model}
"""
