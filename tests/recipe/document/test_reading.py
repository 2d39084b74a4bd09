"""Where a recipe may come from: nothing hangs, and nothing but a message comes of what is not a recipe."""

from __future__ import annotations

import io
import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from merganser.errors import RecipeError
from merganser.recipe import load_recipe, load_recipes
from merganser.recipe.document.reading import read_text

LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"


def refused(source: object) -> str:
    """Return the message; a reader that waits fails instead of hanging the suite."""
    found: list[str] = []

    def load() -> None:
        try:
            load_recipes(source)  # type: ignore[arg-type]
        except RecipeError as error:
            found.append(str(error))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "the reader waits"
    assert len(found) == 1
    return found[0]


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, b"\xef\xbb\xbf" + LINEAR.encode())
    recipe = load_recipe("-")
    assert recipe.merge_method == "linear"
    assert str(recipe.place_of("models")) == "<stdin>:2 models"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "<stdin>: the recipe is empty; it needs at least merge_method and models"),
        (b"\xff", "<stdin>:1: the file is not UTF-8 text; save it as UTF-8"),
        (b"x" * 1_000_001, "<stdin>: a recipe may have 1,000,000 characters at most"),
        (LINEAR.encode("utf-16"), "<stdin>:1: the file is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_bad_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes, message: str) -> None:
    piped(monkeypatch, data)
    assert refused("-") == message


def test_closed_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert refused("-") == "<stdin>: standard input is a terminal, or closed; pipe the recipe in, or give its file"


def test_what_a_shell_opened() -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, LINEAR.encode())
        os.close(writing)
        assert load_recipe(f"/dev/fd/{reading}").merge_method == "linear"
    finally:
        os.close(reading)


def test_a_terminal() -> None:
    controller, terminal = os.openpty()
    try:
        assert refused(f"/dev/fd/{terminal}").endswith(": this is a terminal; pipe the recipe in, or give its file")
    finally:
        os.close(controller)
        os.close(terminal)


def test_pipes_sockets_and_devices(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    remedy = "give a file, or - to read the recipe from standard input"
    assert refused(pipe) == f"{pipe}: this is a named pipe; {remedy}"
    (tmp_path / "link.yaml").symlink_to(pipe)
    assert "this is a named pipe" in refused(tmp_path / "link.yaml")
    assert refused("/dev/zero") == f"/dev/zero: this is a device; {remedy}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert "the recipe cannot be read: " in refused(tmp_path / "s")


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b"])
def test_names_that_no_file_can_have(name: str) -> None:
    assert "the recipe cannot be read: " in refused(name)


def test_byte_order_marks(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + LINEAR.encode())
    assert load_recipe(file).merge_method == "linear"
    file.write_text(f"name: a\n{LINEAR}---\n\ufeff{LINEAR}", encoding="utf-8")
    assert refused(file).startswith(f"{file}:5: a byte-order mark inside the text")
    for encoding in ("utf-16", "utf-32", "latin-1"):
        file.write_bytes((LINEAR + "# é\n").encode(encoding))
        assert refused(file).endswith(": the file is not UTF-8 text; save it as UTF-8")


def test_no_more_is_read_than_a_recipe_may_have(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)
    assert len(read_text(file)) == 1_000_001


LONG = 900_000


@pytest.mark.parametrize(
    "text",
    [
        LINEAR + f"parameters: {{weight: {'1' * LONG}x}}\n",
        LINEAR + f"parameters: {{weight: {'1' * LONG}}}\n",
        LINEAR + f"parameters: {{weight: 0.{'1' * LONG}}}\n",
        LINEAR + f"a: {'[' * LONG}",
        LINEAR + f"a: {'{' * LONG}",
        LINEAR + "? " * (LONG // 2),
        LINEAR + "&a " * (LONG // 3),
        LINEAR + "x\n" * (LONG // 2),
        "---\n" * (LONG // 4) + "name: a\n",
        "merge_method: passthrough\nx: &s {sources: [{model: a, layer_range: [0, 1]}]}\nslices: [" + "*s," * 100_000 + "]\n",
    ],
    ids=["digits and a letter", "digits", "decimals", "lists", "mappings", "keys", "anchors", "lines", "documents", "slices"],
)  # fmt: skip
def test_large_nonsense_is_refused_at_once(text: str) -> None:
    assert refused(text).startswith("<recipe>")


@pytest.mark.parametrize(
    "value", [10**5000, -(10**5000), {10**5000: 1}, ["a\0"], {"a\0": 1}, {"a": "\ud800"}], ids=lambda _: "value"
)
def test_python_values_that_no_text_can_hold(value: object) -> None:
    message = refused({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": value}}]})
    assert message.startswith("<recipe>: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (r'"a\0b"', "this text holds a NUL character"),
        (r'"a\eb"', r"'a\x1bb' must be usable as the name of a folder"),
        (r'"a\nb"', "must be usable as the name of a folder"),
        ("..", "must be usable as the name of a folder"),
        ("x" * 256, "too long for the name of a folder: 256 bytes"),
        ("é" * 128, "too long for the name of a folder: 256 bytes"),
        ("/" * 85 + "x", "must be usable as the name of a folder"),
        ("x/" * 85, "must be usable as the name of a folder"),
        ("a/" * 84 + "bbbb", "too long for the name of a folder: 340 bytes"),
    ],
)
def test_names_of_stages(name: str, message: str) -> None:
    assert message in refused(f"name: {name}\n{LINEAR}---\n{LINEAR}")


def test_thousands_of_stages_are_sorted() -> None:
    count = 3000
    texts = [f"name: s{i}\nmerge_method: linear\nmodels: [{{model: s{i - 1}}}]\n" for i in reversed(range(count))]
    assert [recipe.name for recipe in load_recipes("---\n".join(texts))] == [f"s{i}" for i in range(count)]
    texts.append(f"name: s-1\nmerge_method: linear\nmodels: [{{model: s{count - 1}}}]\n")
    assert len(refused("---\n".join(texts))) < 300
