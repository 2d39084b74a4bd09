"""Names that the system refuses, numbers beyond all bounds, and models that are not there: a message, never a trace."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from tests.cli.tiny import linear, names, recipe, run

LONG = "x" * 300
DIGITS = "9" * 400


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "r.yaml", LONG],
        ["merge", LONG, "out"],
        ["plan", LONG],
        ["inspect", LONG],
        ["diff", LONG, "a"],
        ["verify", LONG],
        ["report", LONG],
        ["restore", LONG, "--task", "x"],
        ["merge", "r.yaml", "out", "--out-shard-size", f"{DIGITS}GB"],
        ["merge", "r.yaml", "out", "--max-memory", DIGITS],
        ["plan", "r.yaml", "--max-memory", f"{2**63}"],
    ],
)
def test_refused_with_a_message(models: Path, command: list[str]) -> None:
    recipe(models / "r.yaml", linear("a", "b"))
    before = names(models)
    found = run(*command)
    assert (found.code, found.out) == (2, "")
    assert "Traceback" not in found.err
    assert "defect" not in found.err
    assert names(models) == before


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.EMFILE, errno.ENOSPC, errno.EIO, errno.ELOOP])
def test_what_the_system_refuses_is_no_defect(models: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("merganser.inspection.contents.inspect", refuse)
    found = run("inspect", "a")
    assert (found.code, found.err) == (2, f"error: some/file: {os.strerror(number)}\n")


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, None])
def test_other_errors_of_the_system_are(models: Path, monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "odd") if number else OSError("odd")

    monkeypatch.setattr("merganser.inspection.contents.inspect", fail)
    found = run("inspect", "a")
    assert found.code == 1
    assert "Traceback" in found.err


def test_a_target_whose_name_is_not_utf_8(models: Path) -> None:
    out = os.fsdecode(b"out\xff")
    recipe(models / "r.yaml", linear("a", "b"))
    for command in (["merge", "r.yaml", out], ["verify", out], ["report", out], ["inspect", out, "--json"]):
        found = run(*command)
        assert found.code == 0, found.err
    assert json.loads((models / out / "merge.json").read_text())["method"] == "linear"
    assert (models / out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": "./no"}, "r.yaml:{line} base_model: model './no' not found: no such file or folder"),
        ({"models": [{"model": "./no"}]}, "r.yaml:{line} models[0]: model './no' not found: no such file or folder"),
        ({"models": [{"model": "org/no"}]}, "r.yaml:{line} models[0]: model 'org/no' not found: "),
        ({"models": [{"model": "empty"}]}, "r.yaml:{line} models[0]: empty: no weights"),
        ({"models": [{"model": "a"}, {"model": "./no"}]}, "r.yaml:{line} models[1]: model './no' not found"),
    ],
)
def test_a_model_that_is_not_there_is_told_with_its_line(
    models: Path, changes: dict[str, object], message: str
) -> None:
    (models / "empty").mkdir()
    recipe(models / "r.yaml", {"merge_method": "karcher", "models": [{"model": "a"}, {"model": "b"}], **changes})
    lines = (models / "r.yaml").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "no" in text.split("model: ")[-1] or "empty" in text)
    for command in (["plan", "r.yaml"], ["merge", "r.yaml", "out"]):
        found = run(*command)
        assert found.code == 2
        assert found.err.startswith(f"error: {message.format(line=line)}")


def test_a_model_of_a_slice_is_told_with_its_line(models: Path) -> None:
    piece = {"sources": [{"model": "a", "layer_range": [0, 1]}]}
    other = {"sources": [{"model": "./no", "layer_range": [0, 1]}]}
    recipe(models / "r.yaml", {"merge_method": "passthrough", "slices": [piece, other]})
    assert run("plan", "r.yaml").err.startswith("error: r.yaml:9 slices[1].sources[0]: model './no' not found")


def test_the_recipe_may_come_from_standard_input(models: Path) -> None:
    from typer.testing import CliRunner

    from merganser.cli import make_app

    text = recipe(models / "r.yaml", linear("a", "b")).read_text()
    found = CliRunner().invoke(make_app("merge"), ["merge", "-", "out"], input=text)
    assert found.exit_code == 0, found.stderr
    found = CliRunner().invoke(make_app("plan"), ["plan", "-"], input=text.replace("weight", "wieght"))
    assert found.exit_code == 2
    assert found.stderr.startswith("error: <stdin>:5 models[0].parameters: unknown parameter 'wieght' of linear.")


@pytest.mark.parametrize("name", ["x" * 240, "é" * 120, "/".join("x" * 60) + "xxx"])
def test_the_longest_names_of_stages(models: Path, name: str) -> None:
    recipe(models / "r.yaml", linear("a", "b", name=name), linear(name, "c"))
    found = run("merge", "r.yaml", "out", "--keep-stages")
    assert found.code == 0, found.err
    recipe(models / "r.yaml", linear("a", "b", name=f"{name}y"), linear(f"{name}y", "c"))
    assert "too long for the name of a folder" in run("merge", "r.yaml", "out2").err
