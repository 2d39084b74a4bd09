"""Working files that a killed or full disk left damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merganser.calibration.output.torchfile import load_working, save_working
from merganser.errors import OutputError


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save_working(({"a": torch.ones(2)}, None), tmp_path / "own.pt")
    (found, none) = load_working(tmp_path / "own.pt")
    assert none is None
    assert found["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("damage", ["empty", "noise", "a zip archive", "half", "missing"])
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "own.pt"
    save_working(torch.ones(1000), file)
    whole = file.read_bytes()
    kinds = {"empty": b"", "noise": b"garbage", "a zip archive": b"PK\x03\x04garbage", "half": whole[: len(whole) // 2]}
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(kinds[damage])
    told = "cannot be read: no such file or directory" if damage == "missing" else "is damaged"
    with pytest.raises(OutputError, match=rf"own\.pt: {told}; start again"):
        load_working(file)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"own\.pt: cannot be written: .*; make room, or choose another disk"):
        save_working(torch.ones(1), tmp_path / "missing/own.pt")
