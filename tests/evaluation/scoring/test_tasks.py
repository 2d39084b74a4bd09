"""Task files: names, kinds, and every slip of the pen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merganser.errors import TaskError
from merganser.evaluation.scoring.tasks import ChoiceTask, HarnessTask, TextTask, glued, load_tasks

GOOD = {"context": "a", "choices": [" b", " c"], "gold": 1}


def line(**changes: object) -> str:
    return json.dumps({name: value for name, value in {**GOOD, **changes}.items() if value is not None})


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("french.test.txt").write_bytes(b"\xef\xbb\xbfbonjour\r\n")
    Path("quiz.jsonl").write_text(f"{line()}\n\n{line(id=3)}\n")
    Path("own.yaml").write_text("task: own\n")


def test_kinds_and_names() -> None:
    text, quiz, own, named, arc = load_tasks(
        ["french.test.txt", "quiz.jsonl", "own.yaml", "le-monde=french.test.txt", "arc_easy"]
    )
    assert isinstance(text, TextTask)
    assert (text.name, text.source) == ("french", "french.test.txt")
    assert text.documents == ("bonjour\r\n",)
    assert isinstance(quiz, ChoiceTask)
    assert [q.where for q in quiz.questions] == ["quiz.jsonl:1", "quiz.jsonl:3"]
    assert isinstance(own, HarnessTask)
    assert named.name == "le-monde"
    assert named.hash == text.hash
    assert isinstance(arc, HarnessTask)
    assert arc.source == "arc_easy"
    assert [task.name for task in load_tasks({"x": "quiz.jsonl"})] == ["x"]


def test_a_file_with_a_strange_name_is_taken_as_it_is() -> None:
    Path("a=b.txt").write_text("x")
    assert load_tasks(["a=b.txt"])[0].name == "a=b"


def test_strings_may_hold_any_line_end() -> None:
    Path("odd.jsonl").write_text(json.dumps({**GOOD, "context": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert load_tasks(["odd.jsonl"])[0].questions[0].context == "a\u2028b"


def test_choices_without_a_space() -> None:
    assert not glued(load_tasks(["quiz.jsonl"])[0])
    Path("glued.jsonl").write_text(line(choices=["b", "c"]))
    assert glued(load_tasks(["glued.jsonl"])[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: is empty; there is nothing to measure"),
        ("a.txt", b" \n\t", r"a\.txt: is empty"),
        ("a.txt", b"ab\xff", r"a\.txt: is not UTF-8 text \(byte 2\)"),
        ("a.jsonl", b"", r"a\.jsonl: is empty"),
        ("a.jsonl", line() + "\n{oops}\n", r"a\.jsonl:2: is not JSON: Expecting property name"),
        ("a.jsonl", line() + "\n[1]\n", r"a\.jsonl:2: expected an object with context, choices, gold"),
        ("a.jsonl", line(gold=None), r"a\.jsonl:1: 'gold' is missing\. Found: context, choices"),
        ("a.jsonl", line(choices=None, choice=["x"]), r"1: 'choices' is missing\. Is 'choice' meant to be 'choices'\?"),
        ("a.jsonl", line(context=3), r"a\.jsonl:1: context must be a text, got 3"),
        ("a.jsonl", line(choices=[" b"]), r"a\.jsonl:1: choices must be a list of two or more texts"),
        ("a.jsonl", line(choices=[" b", " "]), r"a\.jsonl:1: choices must be .* not empty, got \[' b', ' '\]"),
        ("a.jsonl", line(gold=2), r"gold must be the index of the right choice, 0 to 1, got 2"),
        ("a.jsonl", line(gold="1"), r"gold must be the index of the right choice, 0 to 1, got '1'"),
        ("a.jsonl", line(gold=True), r"gold must be .* got True"),
        ("a.jsonl", '{"text": "x"}\n{"text": ""}', r"a\.jsonl:2: text must be a text that is not empty, got ''"),
        ("a.jsonl", '{"text": "x"}\n' + line(), r"a\.jsonl:2: 'text' is missing\. Is 'context' meant to be 'text'\?"),
        ("a.jsonl", '{"text": "\\ud800"}', r"a\.jsonl:1: holds half of a surrogate pair"),
        ("a.csv", b"x,y", r"a\.csv: what a \.csv holds is not known; known are \.txt a text, \.jsonl"),
    ],
)
def test_malformed(name: str, content: str | bytes, message: str) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TaskError, match=message):
        load_tasks([name])


def test_missing_files() -> None:
    with pytest.raises(
        TaskError, match=r"frensh\.test\.txt: there is no such file\. Did you mean 'french\.test\.txt'\?"
    ):
        load_tasks(["frensh.test.txt"])
    with pytest.raises(TaskError, match=r"nowhere/x\.txt: there is no such file"):
        load_tasks(["nowhere/x.txt"])
    Path("folder.txt").mkdir()
    with pytest.raises(TaskError, match=r"folder\.txt: cannot be read: is a folder"):
        load_tasks(["folder.txt"])
    with pytest.raises(TaskError, match="tasks: none given"):
        load_tasks([])


def test_two_of_one_name() -> None:
    Path("french.tune.txt").write_text("salut")
    with pytest.raises(TaskError, match=r"2 are named 'french': french\.test\.txt and french\.tune\.txt.*NAME=FILE"):
        load_tasks(["french.test.txt", "french.tune.txt"])
