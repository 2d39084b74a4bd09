"""`merganser calibrate --add`: statistics of parts of the data become those of all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import merganser
from tests.calibration.families import save
from tests.cli.tiny import run
from tests.evaluation.tiny import add_tokenizer, text
from tests.making import read_files


def test_parts_are_added_as_in_python(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "llama")
    add_tokenizer(model)
    for name, seed in (("a", 1), ("b", 2)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps({"text": text(seed + i, 12)}) for i in range(2)))
        merganser.calibrate(model, [file], tmp_path / f"of-{name}")
    parts = [tmp_path / "of-a", tmp_path / "of-b"]
    added = run("calibrate", "--add", *parts, "--out", tmp_path / "both")
    merganser.add_statistics(parts, tmp_path / "expected")
    assert added.code == 0, added.err
    assert "4 sequences" in added.out
    assert read_files(tmp_path / "both") == read_files(tmp_path / "expected")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "out"], "error: MODEL is missing: give a folder or a Hub id, or --add with folders of statistics"),
        (["--add", "a", "b"], "error: --out is missing: give the folder to write"),
        (["model", "--add", "a", "b", "--out", "out"], "error: MODEL is for measuring, and --add only adds"),
        (["--add", "a", "b", "--seed", "0", "--out", "out"], "error: --seed is for measuring, and --add only adds"),
        (["--add", "a", "--out", "out", "--data", "d.txt"], "error: --data is for measuring, and --add only adds"),
        (["--add", "a", "b", "--out", "out"], "error: a: there is no such folder"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = run("calibrate", *arguments)
    assert refused.code == 2
    assert message in refused.err
    assert not list(tmp_path.iterdir())
