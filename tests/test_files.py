"""Files that appear whole, or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from merganser.errors import OutputError
from merganser.files import sha256_of_file, write_whole


def test_a_file_is_replaced_whole_and_nothing_else_is_touched(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for name in (".out.json.new", ".out.json"):
        (tmp_path / name).symlink_to(mine)
    out = tmp_path / "out.json"
    for text in ("first", "second ö"):
        write_whole(out, text)
        assert out.read_text(encoding="utf-8") == text
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.json", ".out.json.new", "mine.txt", "out.json"]


def test_what_was_there_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    write_whole(out, "before")

    def failing(descriptor: int, *arguments: object, **keys: object) -> None:
        os.close(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", failing)
    with pytest.raises(OutputError, match=r"out\.json: cannot be written: no space left on device"):
        write_whole(out, "after")
    assert out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_temporary_file_of_a_fixed_name_is_replaced_and_no_link_is_followed(tmp_path: Path) -> None:
    """A killed run left it; the folder's marker lists it."""
    out, temporary = tmp_path / "out.json", tmp_path / ".out.json.new"
    temporary.write_text("cut off, and longer")
    write_whole(out, "whole", temporary=temporary)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.json", "whole")]
    temporary.symlink_to(out)
    with pytest.raises(OutputError, match=r"out\.json: cannot be written"):
        write_whole(out, "through a link", temporary=temporary)
    assert out.read_text() == "whole"


def test_the_sha256_of_a_file_and_how_far_it_was_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(3_000_000))
    told: list[int] = []
    assert sha256_of_file(file, told.append) == hashlib.sha256(bytes(3_000_000)).hexdigest() == sha256_of_file(file)
    assert told == [1 << 20, 2 << 20, 3_000_000]
