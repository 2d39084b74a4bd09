"""A merge to draw: a base, and three models that moved a little from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.tiny import recipe, run, state, write


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MERGANSER_DEBUG", raising=False)


def moved(seed: int, size: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = state(0, dtype=torch.float32)
    return {name: t + size * torch.randn(t.shape, generator=generator) for name, t in base.items()}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders base, one, two and three in the current folder."""
    write(tmp_path / "base", state(0, dtype=torch.float32))
    for seed, name in enumerate(("one", "two", "three"), 1):
        write(tmp_path / name, moved(seed, 0.01 * seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def out(models: Path) -> Path:
    """What a merge by task arithmetic wrote."""
    return merged(models, "task_arithmetic", "base")


def merged(models: Path, method: str, base: str | None, name: str = "out") -> Path:
    listed = [{"model": model, "parameters": {"weight": 0.5}} for model in ("one", "two", "three")]
    document = {"merge_method": method, **({"base_model": base} if base else {}), "models": listed}
    done = run("merge", recipe(models / f"{name}.yaml", document), name, "--quiet", "--threads", "1")
    assert done.code == 0, done.err
    return models / name
