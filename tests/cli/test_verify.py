"""`merganser verify`: every change of an output is found and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from merganser import verify
from merganser.errors import CheckpointError, NotFoundError
from tests.cli.tiny import linear, recipe, run


@pytest.fixture
def out(models: Path) -> Path:
    assert run("merge", recipe(models / "r.yaml", linear("a", "b")), "out", "--quiet").code == 0
    return models / "out"


def test_as_written(out: Path) -> None:
    size = sum(file.stat().st_size for file in out.iterdir() if file.name != "merge.json")
    found = run("verify", "out")
    assert (found.code, found.err) == (0, "")
    assert found.out == f"out: 4 files, {size / 1000:.2f} KB, all as they were written\n"
    assert run("verify", "out", "--json").json["ok"] is True


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_one_bit(out: Path) -> None:
    flip(out / "model.safetensors")
    found = run("verify", "out")
    assert found.code == 2
    assert found.out.startswith("model.safetensors: has sha256 ")
    assert ", was written with " in found.out
    assert found.err == ("error: out: 1 of 4 files not as written; merge again, or remove what does not belong there\n")


def test_every_kind_of_change_at_once(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    (out / "config.json").write_text("{}")
    (out / "README.md").unlink()
    (out / "README.md").mkdir()
    shutil.copy(out / "model.safetensors", out / "model-00001-of-00002.safetensors")
    found = run("verify", "out")
    assert found.code == 2
    lines = dict(line.split(": ", 1) for line in found.out.splitlines())
    assert lines["tokenizer.json"] == "is missing"
    assert lines["README.md"] == "is not a file"
    assert lines["config.json"].startswith("has 2 bytes, was written with ")
    assert lines["model-00001-of-00002.safetensors"] == "holds weights, and was not written by this merge"
    assert "3 of 4 files not as written, 1 file of weights too many" in found.err
    described = run("verify", "out", "--json")
    assert described.code == 2
    assert described.json["ok"] is False
    assert described.json["extra"] == ["model-00001-of-00002.safetensors"]
    assert sum(file["problem"] is not None for file in described.json["files"]) == 3


def test_progress_ends_at_all_bytes(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    told: list[tuple[int, int]] = []
    verify(out, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0


def test_other_files_are_not_our_business(out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    assert verify(out).ok


def entry(**changes: Any) -> dict[str, Any]:
    return {"file": "model.safetensors", "bytes": 1, "sha256": "0" * 64} | changes


BROKEN = [
    ("{", "is not valid JSON"),
    ("[]", "must be a JSON object"),
    ("{}", "must have a list 'outputs'"),
    ({"outputs": {}}, "must have a list 'outputs'"),
    ({"outputs": []}, "must have a list 'outputs'"),
    ({"outputs": ["model.safetensors"]}, r"outputs\[0\]: must be an object with file, bytes and sha256"),
    ({"outputs": [entry(file=3)]}, "file must be the name of a file, got 3"),
    ({"outputs": [entry(file="")]}, "file must be the name of a file"),
    ({"outputs": [entry(file="../a/config.json")]}, "is not inside the folder"),
    ({"outputs": [entry(file="/etc/passwd")]}, "is not inside the folder"),
    ({"outputs": [entry(), entry(bytes="1")]}, r"outputs\[1\]: bytes must be a whole number"),
    ({"outputs": [entry(bytes=-1)]}, "bytes must be a whole number of at least 0, got -1"),
    ({"outputs": [entry(bytes=True)]}, "bytes must be a whole number"),
    ({"outputs": [entry(sha256="00")]}, "sha256 must be 64 hexadecimal digits, got '00'"),
    ({"outputs": [entry(sha256="g" * 64)]}, "sha256 must be 64 hexadecimal digits"),
]


@pytest.mark.parametrize(("record", "message"), BROKEN)
def test_broken_record(tmp_path: Path, record: Any, message: str) -> None:
    (tmp_path / "merge.json").write_text(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'merge.json'}: ")


def test_no_output(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing: no such folder"):
        verify(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match=r"has no merge\.json; only what merganser wrote can be verified"):
        verify(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotFoundError, match="file: is not a folder"):
        verify(tmp_path / "file")
