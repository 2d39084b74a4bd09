from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.tiny import state, write


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MERGANSER_DEBUG", "FORCE_COLOR", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models a, b and c in the current folder."""
    for seed, name in enumerate("abc"):
        write(tmp_path / name, state(seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path
