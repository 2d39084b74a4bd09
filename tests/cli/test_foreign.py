"""Texts that others wrote, with what a terminal would obey in them: nothing of it is printed as it is."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merganser import cli
from merganser.wording import printable, printable_json
from tests.cli.tiny import Output, linear, recipe, run, state, write

EVIL = "\x1b[31m\x07\x9b2J\u202eevil\u2066\r\n\x7f\u2028"
SHOWN = r"\x1b[31m\x07\x9b2J\u202eevil\u2066\r\n\x7f\u2028"


def check(found: Output) -> None:
    """Check that a terminal would obey nothing in an output but line breaks."""
    for text in (found.out, found.err):
        unsafe = [letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp", "Cs")]
        assert set(unsafe) <= {"\n"}


@pytest.mark.parametrize("letter", ["\x00", "\x1b", "\t", "\r", "\n", "\x7f", "\x85", "\x9b", "\u061c", "\u200b", "\u200f",
                                    "\u2028", "\u202a", "\u202e", "\u2066", "\ufeff", "\ud800", "\U000e0041"])  # fmt: skip
def test_what_is_escaped(letter: str) -> None:
    shown = printable(f"a{letter}b")
    assert shown.isascii()
    assert shown.isprintable()
    assert shown != "ab"
    made = printable_json(json.dumps([letter], ensure_ascii=False))
    assert json.loads(made) == [letter]
    assert made.isascii()


@pytest.mark.parametrize(
    "text", ["plain", "naïve", "模型", "مدل", "क्ष", "👩\u200d🚀", "a\u0301", "α → β · ±1 %", "C:\\x1b"]
)
def test_what_stays(text: str) -> None:
    assert printable(text) == text
    assert printable_json(json.dumps(text, ensure_ascii=False)) == json.dumps(text, ensure_ascii=False)


@given(st.text())
def test_any_text_is_made_safe_once(text: str) -> None:
    assert printable(printable(text)) == printable(text)
    assert json.loads(printable_json(json.dumps({text: text}, ensure_ascii=False, indent=1))) == {text: text}


@pytest.fixture
def evil(models: Path) -> Path:
    """Models a and b with a tensor of an evil name, in folders of the same."""
    for seed, name in enumerate("ab"):
        write(
            models / f"{name}\x1b[31m\u202e", state(seed) | {EVIL: torch.full((3,), float(seed))}, architectures=[EVIL]
        )
    return recipe(models / "r\x1b.yaml", linear("a", "b", name="x"))


def folders(models: Path) -> list[str]:
    return sorted(path.name for path in models.glob("[ab]*\u202e"))


def merging(models: Path, **more: object) -> Path:
    """Write a recipe of the evil models; a path with a control character is a link, since recipes have no such text."""
    for short, folder in zip("pq", folders(models), strict=True):
        if not (models / short).exists():
            (models / short).symlink_to(folder)
    return recipe(models / "r\x1b\u202e.yaml", linear("p", "q", **more))


@pytest.mark.parametrize("options", [[], ["--tensors"], ["--json"], ["--json", "--tensors"]])
def test_inspect_plan_and_diff(models: Path, evil: Path, options: list[str]) -> None:
    a, b = folders(models)
    shown = []
    for command in (["inspect", a], ["plan", merging(models)], ["diff", a, b], ["inspect", a, b, "--base", "a"]):
        found = run(*command, *options)
        check(found)
        shown.append(found.out)
        if "--json" in options and found.code == 0:
            json.loads(found.out)
    assert "evil" in shown[0]
    if "--tensors" in options and "--json" not in options:
        assert all(SHOWN in text for text in shown[:3])


def test_merge_verify_and_report(models: Path, evil: Path) -> None:
    out = "out\x1b[2J\u202e"
    for command in (["merge", merging(models), out], ["verify", out], ["report", out, "--text"], ["plan", evil]):
        found = run(*command)
        assert found.code == 0, found.err
        check(found)
    (models / out / "model.safetensors").write_bytes(b"x")
    for command in (["verify", out], ["merge", merging(models), out], ["report", out, "--json", "--out", out]):
        found = run(*command)
        assert found.code == 2
        check(found)
        assert "\\x1b[2J" in found.out + found.err


def test_errors(models: Path, evil: Path) -> None:
    a, b = folders(models)
    write(models / b, state(1) | {EVIL: torch.ones(4)})
    cases = [
        run("merge", merging(models), "out"),
        run("merge", "no\x1b[31m\u202e.yaml", "out"),
        run("inspect", f"./{EVIL}"),
        run("merge", recipe(models / "s.yaml", linear("a", "b", **{f"k{EVIL}": 1})), "out"),
        run("merge", recipe(models / "s.yaml", linear("a", "b", merge_method=EVIL)), "out"),
        run("merge", recipe(models / "s.yaml", linear("a", f"./{EVIL}")), "out"),
        run("merge", "r.yaml", "out", f"--{EVIL}"),
        run("merge", "r.yaml", "out", EVIL),
        run("merge", "r.yaml", "out", "--out-shard-size", EVIL),
        run("methods", EVIL),
        run(EVIL),
        run(f"--{EVIL}"),
        run("restore", a, "--task", EVIL),
        run("report", a, "--out", EVIL),
        run("eval", a, "--tasks", EVIL),
    ]
    for found in cases:
        assert found.code == 2
        check(found)
        assert found.err


def test_traces_of_defects(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError(EVIL)

    monkeypatch.setattr("merganser.inspection.contents.inspect", fails)
    found = run("inspect", "a")
    assert found.code == 1
    assert SHOWN.partition(r"\n")[0] in found.err
    assert "Traceback" in found.err
    check(found)


def test_all_that_is_printed_goes_through_one_file() -> None:
    folder = Path(cli.__file__).parent
    printing = re.compile(r"\b(typer\.s?echo|print_exc|sys\.std(out|err)\.write|(?<![\w.])print)\(")
    files = folder.rglob("*.py")
    found = {path.relative_to(folder).as_posix() for path in files if printing.search(path.read_text(encoding="utf-8"))}
    # the version is our own text
    assert found == {"printing/text.py", "__init__.py"}


def test_progress_bars_take_names_for_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from merganser.cli.printing import progress as _progress

    screen = io.StringIO()
    monkeypatch.setattr(_progress, "on_terminal", lambda: True)
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=200))
    with _progress.EvalProgress(quiet=False) as progress:
        progress.loading(f"[/red]{EVIL}", 0, 1)
    assert f"[/red]{SHOWN}" in screen.getvalue()
