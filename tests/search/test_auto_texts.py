"""`merganser auto`: texts of the experts' fields, and their halves."""

from __future__ import annotations

from pathlib import Path

import pytest

from merganser.errors import MergeError
from merganser.search.auto.texts import halve, read_texts


def test_a_text_is_divided_at_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree and more\nfour\n")
    firsts, seconds = halve({"a": tmp_path / "a.txt"}, tmp_path / "texts")
    assert firsts["a"].read_text() == "one\ntwo\nthree and more\n"
    assert seconds["a"].read_text() == "four\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one line", "is one line, and cannot be divided"),
        ("a.jsonl", '{"text": "one"}\n', "is one line, and cannot be divided"),
        ("a.jsonl", '{"context": "q", "choices": [" a", " b"], "gold": 0}\n', "holds questions; as data give texts"),
        ("a.parquet", "PAR1", "only .txt and .jsonl are divided into a half to calibrate on"),
    ],
)
def test_what_is_not_divided(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(MergeError, match=message):
        halve({"a": tmp_path / name}, tmp_path / "texts")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["calmer=one.jsonl"], "'calmer' is not an expert. Did you mean 'calm'"),
        (["calm=one.jsonl", "calm=two.jsonl"], "two files for calm"),
        (["calm=one.jsonl"], "no text of cool"),
        (["calm=none.txt", "cool=one.jsonl"], "none.txt: there is no such file"),
    ],
)
def test_which_texts_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        read_texts(given, ["calm", "cool"])
