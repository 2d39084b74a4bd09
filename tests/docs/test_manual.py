"""The manual page: every verb and option is in it, and it is installed."""

from __future__ import annotations

import re
from pathlib import Path

import typer.main

from merganser.cli import make_app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "merganser.1"


def test_every_verb_and_option() -> None:
    text = PAGE.read_text(encoding="utf-8").replace(r"\-", "-")
    told = dict(
        re.findall(
            r'^\.SS "merganser ([a-z ]+?)(?: [A-Z[][^\n]*)?"\n(.*?)(?=^\.S[SH] )', text, re.MULTILINE | re.DOTALL
        )
    )
    verbs = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]
    parts = {
        f"{name} {part}".strip(): inner
        for name, verb in verbs.items()
        for part, inner in (getattr(verb, "commands", None) or {"": verb}).items()
    }
    assert told.keys() == parts.keys()
    for name, verb in parts.items():
        options = [word for p in verb.params for word in p.opts if word.startswith("--") and p.name != "help"]
        assert [word for word in options if not re.search(rf"{word}\b", told[name])] == []


def test_no_line_is_taken_for_a_command_of_the_formatter() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    known = {".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".I", ".RI", r".\""}
    assert {line.split()[0] for line in lines if line.startswith((".", "'"))} <= known


def test_it_is_installed() -> None:
    assert '"share/man/man1" = ["docs/merganser.1"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
