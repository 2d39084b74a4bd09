from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.tiny import make_model


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two models near it, and one whose tokenizer puts a token in front of texts."""
    root = tmp_path_factory.mktemp("zoo")
    make_model(root / "base", 0)
    make_model(root / "a", 1, like=root / "base")
    make_model(root / "b", 2, like=root / "base")
    make_model(root / "bos", 3, bos=True)
    return root
