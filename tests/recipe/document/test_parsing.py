"""The safe YAML loader: values, lines, and everything that it must refuse."""

from __future__ import annotations

import enum
import re
from pathlib import Path

import pytest
import yaml

from merganser.errors import NotFoundError, RecipeError
from merganser.recipe.document import parsing
from merganser.recipe.document.parsing import parse_mapping, parse_text, plain
from merganser.recipe.document.reading import read_text


@pytest.fixture(params=["C", "Python"], autouse=True)
def _parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parsers of PyYAML: the C one may be missing."""
    monkeypatch.setattr(parsing, "_LOADER", yaml.CSafeLoader if request.param == "C" else yaml.SafeLoader)


def parsed(text: str) -> object:
    (only,) = parse_text(text, "recipe.yaml")
    return plain(only.root)


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_text(text, "recipe.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("+3", 3),
        ("1_000", 1000),
        ("0", 0),
        ("yes", True),
        ("Off", False),
        ("TRUE", True),
        ("~", None),
        ("null", None),
        ("'1'", "1"),
        ('"yes"', "yes"),
        ("'null'", "null"),
        ("!!str 5", "5"),
        ("! 5", "5"),
        ("!!float 5", 5),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".", "."),
        ("./model", "./model"),
        ("org/name@main+lora", "org/name@main+lora"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    result = parsed(f"x: {text}\n")
    assert result == {"x": value}
    assert type(result["x"]) is type(value)  # type: ignore[index]


def test_keys_stay_texts() -> None:
    assert parsed("1: a\nyes: b\nnull: c\n") == {"1": "a", "yes": "b", "null": "c"}


def test_aliases_and_merge_keys() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [{z: 4}, *a]}\nd: *a\n"
    one = {"x": 1, "y": 2}
    assert parsed(text) == {"a": one, "b": {"y": 3, "x": 1}, "c": {"z": 4, **one}, "d": one}


def test_lines_are_those_of_keys_and_dashes() -> None:
    (only,) = parse_text("# first\na: 1\nb:\n  - x\n  -\n    y: &y 2\nc: *y\n", "recipe.yaml")
    root = only.root.value
    assert isinstance(root, dict)
    assert [root[key].line for key in "abc"] == [2, 3, 7]
    items = root["b"].value
    assert isinstance(items, list)
    assert [item.line for item in items] == [4, 6]


def test_documents_keep_their_text() -> None:
    text = "# about\na: 1\n---\nb: 2 # two\n---\n# nothing\n--- {c: 3}\n"
    documents = parse_text(text, "recipe.yaml")
    assert [plain(each.root) for each in documents] == [{"a": 1}, {"b": 2}, {"c": 3}]
    assert [each.text for each in documents] == ["# about\na: 1\n", "---\nb: 2 # two\n", "--- {c: 3}\n"]
    assert documents[1].root.value["b"].line == 4  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "recipe.yaml:2: key 'a' is written twice, first in line 1; remove one of them"),
        (
            "a: !!python/name:os.system\n",
            "recipe.yaml:1: the tag '!!python/name:os.system' is not allowed; recipes hold plain values only",
        ),
        ("a: 1\nb: !!set {x}\n", "recipe.yaml:2: the tag '!!set' is not allowed; recipes hold plain values only"),
        ("a: !mine [1]\n", "recipe.yaml:1: the tag '!mine' is not allowed; recipes hold plain values only"),
        ("a: !!int x\n", "recipe.yaml:1: the tag !!int does not fit 'x'"),
        ("a: *b\n", "recipe.yaml:1: alias *b has no anchor before it; write &b before the value that it repeats"),
        ("a: &a\n  - *a\n", "recipe.yaml:2: alias *a is inside the value that it refers to; move it behind that value"),
        (
            "a: &a 1\n---\nb: *a\n",
            "recipe.yaml:3: alias *a has no anchor before it; write &a before the value that it repeats",
        ),
        ("? [a]\n: 1\n", "recipe.yaml:1: a key must be a plain text, not a list, mapping or alias"),
        ("a: &a x\n*a : 1\n", "recipe.yaml:2: a key must be a plain text, not a list, mapping or alias"),
        ("a: {<<: 1}\n", "recipe.yaml:1: '<<' takes a mapping or a list of mappings, got 1"),
        (f"{'k' * 300}: 1\n", "recipe.yaml:1: a key of 300 characters; 200 are allowed"),
        ("a: .inf\n", "recipe.yaml:1: '.inf' is not a finite number"),
        ("a:\n  - -.INF\n", "recipe.yaml:2: '-.INF' is not a finite number"),
        ("a: .NaN\n", "recipe.yaml:1: '.NaN' is not a finite number"),
        ("a: 1e999\n", "recipe.yaml:1: inf is not a finite number"),
        (f"a: {'9' * 9999}\n", "recipe.yaml:1: a number of too many digits; if it is a text, put it in quotes"),
        ("a: 9223372036854775808\n", "recipe.yaml:1: a number of too many digits; if it is a text, put it in quotes"),
        ("a:\n\t- b\n", "recipe.yaml:2: not valid YAML: a tab cannot indent a line; use spaces"),
        ("a:\n  - b\nx: \x00\n", "recipe.yaml:3: not valid YAML: a character that is not allowed"),
        (f"a: {'[' * 70}\n", "recipe.yaml:1: a recipe may be nested 64 levels deep at most"),
    ],
)
def test_refused(text: str, message: str) -> None:
    assert refused(text) == message


@pytest.mark.parametrize(("text", "line"), [("a: [1\nb: 2\n", 2), ("a: 'x\n", 2), ("a: b: c\n", 1), ("a: @x\n", 1)])
def test_syntax_errors_name_the_line(text: str, line: int) -> None:
    assert refused(text).startswith(f"recipe.yaml:{line}: not valid YAML: ")


def test_alias_bomb_is_refused_before_it_unfolds() -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 30))
    message = "recipe.yaml:6: a recipe may hold 100,000 values at most, those of aliases included"
    assert refused(f"l0: &l0 [x]\n{levels}") == message


def test_too_many_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "_LOADER", yaml.CSafeLoader)
    assert refused(f"a: [{'1,' * 100_001}]\n").endswith("may hold 100,000 values at most, those of aliases included")


def test_nothing_is_executed(tmp_path: Path) -> None:
    target = tmp_path / "made"
    refused(f"a: !!python/object/apply:os.mkdir ['{target}']\n")
    assert not target.exists()


def test_read_text(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9\n")
    assert read_text(file) == "a: é\n"


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    with pytest.raises(NotFoundError, match=re.escape(f"{file}: there is no such recipe file")):
        read_text(file)
    with pytest.raises(RecipeError, match=re.escape(f"{tmp_path}: this is a folder; give the recipe file in it")):
        read_text(tmp_path)
    file.write_bytes(b"a: 1\nb: \xff\xfe\n")
    with pytest.raises(RecipeError, match=re.escape(f"{file}:2: the file is not UTF-8 text; save it as UTF-8")):
        read_text(file)
    file.write_bytes(b"#" * 1_000_001)
    with pytest.raises(RecipeError, match=re.escape(f"{file}: a recipe may have 1,000,000 characters at most")):
        parse_text(read_text(file), str(file))


class Word(str, enum.Enum):
    LINEAR = "linear"


def test_python_values_become_plain_ones() -> None:
    np = pytest.importorskip("numpy")
    value = {"a": Word.LINEAR, "b": Path("x") / "y", "c": (np.float64(0.5), 2, True, None), Word.LINEAR: {}}
    made = parse_mapping(value, "<recipe>")
    expected = {"a": "linear", "b": str(Path("x") / "y"), "c": [0.5, 2, True, None], "linear": {}}
    assert plain(made.root) == expected
    assert yaml.safe_load(made.text) == expected


@pytest.mark.parametrize("value", ["1e5", "5", "yes", "null", "", "12e34", "a: b", "~", "é", "x\ny", 1e-5, 1e20, -0.0])
def test_text_of_a_mapping_reads_as_the_mapping(value: object) -> None:
    made = parse_mapping({"x": [value]}, "<recipe>")
    found = parsed(made.text)
    assert found == {"x": [value]}
    assert type(found["x"][0]) is type(value)  # type: ignore[index]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1: 2}, "<recipe>: a key must be a short text, got 1"),
        ({"a": {1, 2}}, "<recipe>: a recipe holds texts, numbers, flags, lists and mappings, got 'set'"),
        ({"a": float("nan")}, "<recipe>: nan is not a finite number"),
        ({"a": 10**400}, "<recipe>: a number of too many digits; if it is a text, put it in quotes"),
    ],
)
def test_python_values_refused(value: dict[object, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_mapping(value, "<recipe>")
    assert str(caught.value) == message


def test_circular_python_values_are_refused() -> None:
    value: dict[str, object] = {}
    value["a"] = value
    with pytest.raises(RecipeError, match="nested 64 levels"):
        parse_mapping(value, "<recipe>")
