"""Data to calibrate on: texts, prompts with completions, and conversations, from files."""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import xxhash

from ...errors import DataError, UnsupportedError, did_you_mean
from ...jsonfile import LFS_MAGIC, LFS_POINTER, os_reason, repeated_key
from ...wording import brief

__all__ = ["KEYS", "Conversation", "DataFile", "Pair", "Record", "Text", "make_record", "read_data"]

SUFFIXES = {
    ".txt": "one text",
    ".jsonl": "one object per line",
    ".parquet": "one row per text or conversation",
}
_FORMS = "text, or prompt and completion, or messages"
KEYS = ("text", "prompt", "completion", "messages")


@dataclass(frozen=True, slots=True)
class Text:
    """A text."""

    text: str
    where: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and its completion."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, each with a role and a content, and what else the file says of it, for the chat template."""

    messages: tuple[Mapping[str, Any], ...]
    where: str


Record = Text | Pair | Conversation


@dataclass(frozen=True)
class DataFile:
    """A file of data.

    Args:
        path: The path as given.
        hash: xxh3-128 of its bytes.
        nbytes: Size of the file.
        records: The records in the file.
    """

    path: str
    hash: str
    nbytes: int
    records: tuple[Record, ...]


def read_data(files: str | Path | Sequence[str | Path]) -> list[DataFile]:
    """Read files of data.

    Args:
        files: Texts (.txt), or objects with text, prompt and completion, or messages (.jsonl, .parquet).

    Returns:
        The files, in an order that does not depend on the order of the arguments.

    Raises:
        DataError: No file is given, or one is given twice, missing, empty or malformed.
        UnsupportedError: A Parquet file is given, and pyarrow is not installed.
    """
    if not files:
        raise DataError(f"data: no file given; give {_known()}")
    if isinstance(files, str | Path):
        files = [files]
    found = sorted((_read_file(str(file)) for file in files), key=lambda file: file.hash)
    for one, other in pairwise(found):
        if one.hash == other.hash:
            raise DataError(f"{other.path}: holds the same as {one.path}; give each file once")
    return found


def _known() -> str:
    return ", ".join(f"{suffix} ({meaning})" for suffix, meaning in SUFFIXES.items())


def _read_file(name: str) -> DataFile:
    path = Path(name).expanduser()
    data = _bytes(path, name)
    read = {".txt": _text, ".jsonl": _lines, ".parquet": _rows}.get(path.suffix.lower())
    if read is None:
        kind = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
        raise DataError(f"{name}: what {kind} holds is not known; known are {_known()}")
    if data.startswith(LFS_MAGIC):
        raise DataError(f"{name}: {LFS_POINTER}")
    if not data.strip():
        raise DataError(f"{name}: is empty; there is nothing to calibrate on")
    records = tuple(read(name, data))
    if not records:
        raise DataError(f"{name}: has no rows; there is nothing to calibrate on")
    return DataFile(name, xxhash.xxh3_128_hexdigest(data), len(data), records)


def _bytes(path: Path, name: str) -> bytes:
    if not name:
        raise DataError(f"data: the name of a file is empty; give {_known()}")
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"{name}: is a folder; give the files in it, {_known()}")
        if not stat.S_ISREG(mode):
            # reading a pipe might wait for its writer, and cannot be repeated when the run continues
            raise DataError(f"{name}: is not a file but a pipe or a device; write the data to a file first")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise DataError(f"{name}: is a link to {path.readlink()}, which does not exist") from None
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise DataError(f"{name}: there is no such file.{near}") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name!r}: is not the name of a file: {error}") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {os_reason(error)}") from None


def _decoded(name: str, data: bytes) -> str:
    try:
        # drop the byte order mark
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None


def _text(name: str, data: bytes) -> Iterator[Record]:
    text = _decoded(name, data)
    if not text.strip():
        raise DataError(f"{name}: is empty; there is nothing to calibrate on")
    yield Text(text, name)


def _lines(name: str, data: bytes) -> Iterator[Record]:
    # not splitlines: JSON strings may contain U+2028 and other Unicode line ends
    for number, line in enumerate(_decoded(name, data).split("\n"), 1):
        if line.strip():
            where = f"{name}:{number}"
            yield make_record(where, _object(where, line))


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line, object_pairs_hook=_without_repeats)
    except _Repeated as error:
        raise DataError(f"{where}: has {_short(str(error))} twice, and only one of them can be meant") from None
    except (ValueError, RecursionError) as error:
        # of others, such as a number of thousands of digits, Python's own message tells programmers what to do
        reason = (
            error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deeply, or has a huge number"
        )
        raise DataError(f"{where}: is not JSON: {reason}; each line must hold one object with {_FORMS}") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: must be an object with {_FORMS}, found {_short(found)}")
    return found


class _Repeated(Exception):
    """A key stands twice in one object."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated_key(pairs)
    if twice is not None:
        raise _Repeated(twice)
    return dict(pairs)


def _short(value: Any) -> str:
    return brief(value, 60)


def _named(keys: Iterable[Any]) -> str:
    """Return keys on one line, the first eight of them."""
    listed = [_short(key) for key in keys]
    more = f", and {len(listed) - 8} more" if len(listed) > 8 else ""
    return (", ".join(listed[:8]) or "nothing") + more


def _rows(name: str, data: bytes) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UnsupportedError(
            f"{name}: reading Parquet needs pyarrow, which is not installed: pip install 'merganser[data]'; or convert it to .jsonl"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        others = file.schema_arrow.names
        columns = [column for column in others if column in KEYS]
        twice = next((column for column in columns if columns.count(column) > 1), None)
        if twice is not None:
            raise DataError(f"{name}: has {twice!r} twice, and only one of them can be meant")
        rows = file.read(columns=columns).to_pylist()
    # bytes that are no UTF-8 are found when they become texts
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: is not a Parquet file, or damaged: {str(error).splitlines()[0][:200]}") from None
    for number, row in enumerate(rows, 1):
        # a null means that the row lacks this column
        own = {key: value for key, value in row.items() if value is not None}
        yield make_record(f"{name}: row {number}", own or dict.fromkeys(others))


def make_record(where: str, found: Mapping[str, Any]) -> Record:
    """Return what an object of a file, or a row, holds.

    Args:
        where: File and line, for messages.
        found: The object.

    Raises:
        DataError: It has no text, or prompt and completion, or messages, or more than one of these, or they are malformed.
    """
    forms: dict[tuple[str, ...], Callable[[str, Mapping[str, Any]], Record]] = {
        ("text",): _plain,
        ("prompt", "completion"): _pair,
        ("messages",): _conversation,
    }
    present = [keys for keys in forms if any(key in found for key in keys)]
    if not present:
        near = next(
            (f" Is {_short(key)} meant to be{hint[13:]}" for key in found if (hint := did_you_mean(key, KEYS))), ""
        )
        raise DataError(f"{where}: has neither {_FORMS}.{near} Found: {_named(found)}")
    if len(present) > 1:
        keys = " and ".join(repr(key) for own in present for key in own if key in found)
        raise DataError(f"{where}: has {keys}, and only one of them can be meant; give {_FORMS}")
    for key in present[0]:
        if key not in found:
            raise DataError(f"{where}: {key!r} is missing; found: {_named(found)}")
    return forms[present[0]](where, found)


def _string(where: str, key: str, value: Any, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} must be a text, found {_short(value)}")
    if not empty and not value.strip():
        raise DataError(f"{where}: {key} is empty; leave the line out, or give a text")
    try:
        # a lone surrogate such as \ud800 is not a character, and no tokenizer accepts it
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {key} holds half of a surrogate pair, which is not text") from None
    return value


def _plain(where: str, found: Mapping[str, Any]) -> Record:
    return Text(_string(where, "text", found["text"]), where)


def _pair(where: str, found: Mapping[str, Any]) -> Record:
    prompt = _string(where, "prompt", found["prompt"], empty=True)
    return Pair(prompt, _string(where, "completion", found["completion"]), where)


def _conversation(where: str, found: Mapping[str, Any]) -> Record:
    messages = found["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of objects with role and content, found {_short(messages)}")
    read: list[Mapping[str, Any]] = []
    for number, message in enumerate(messages, 1):
        place = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{place}: must be an object with role and content, found {_short(message)}")
        for key in ("role", "content"):
            if key not in message:
                raise DataError(f"{place}: {key!r} is missing.{_hint(key, message)} Found: {_named(message)}")
        _string(place, "role", message["role"])
        _string(place, "content", message["content"], empty=True)
        # a null means that there is none, as in a table whose other rows have one
        read.append({key: value for key, value in message.items() if value is not None})
    return Conversation(tuple(read), where)


def _hint(key: str, found: Mapping[str, Any]) -> str:
    other = next((k for k in found if k not in ("role", "content") and did_you_mean(k, [key])), None)
    return f" Is {other!r} meant to be {key!r}?" if other else ""
