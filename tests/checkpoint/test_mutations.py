"""Every reader against random damage: a file is read, or refused with a message; nothing else happens."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from merganser.checkpoint import folder
from merganser.errors import CheckpointError
from tests.checkpoint.mutations import FORMATS, damage, refused

MANY = 25


def beside(file: Path) -> Path:
    """Stand for transformers, which would make a config from a GGUF file; importing it takes long."""
    raise CheckpointError(f"{file}: no config.json lies beside it")


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "folder_beside", beside)
    FORMATS[name](tmp_path / "valid")
    assert not refused(tmp_path / "valid")
    count = 0
    for seed in range(MANY):
        shutil.copytree(tmp_path / "valid", tmp_path / "bad")
        draw = random.Random(f"{name} {seed}")
        what = [damage(tmp_path / "bad", draw) for _ in range(draw.choice((1, 1, 2)))]
        try:
            count += refused(tmp_path / "bad")
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {'; '.join(what)}") from error
        shutil.rmtree(tmp_path / "bad")
    # most of the damage is where it shows
    assert count > MANY // 4
