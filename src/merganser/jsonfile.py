"""Read files from untrusted sources, and the JSON in them."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .errors import CheckpointError, NotFoundError
from .system import NO_BLOCKING, open_binary
from .wording import brief

__all__ = [
    "LFS_MAGIC",
    "LFS_POINTER",
    "MAX_JSON_BYTES",
    "exists",
    "open_regular",
    "os_reason",
    "parse_object",
    "parse_object_file",
    "read_bytes",
    "read_file",
    "read_json",
    "read_object",
    "repeated_key",
]

MAX_JSON_BYTES = 100_000_000
"""Largest JSON text that is parsed, in bytes; the safetensors format sets the same limit for its header."""

LFS_MAGIC = b"version "
"""First bytes of a Git LFS pointer: the small text file that a clone without Git LFS has in place of a large file."""

LFS_POINTER = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or fetch the file again"

# transformers writes an unlimited length as int(1e30), which has 31 digits
_MAX_DIGITS = 40
_LONG_NUMBER = re.compile(rf"[0-9]{{{_MAX_DIGITS + 1}}}")

MAX_DEPTH = 64
"""Largest number of nested lists and objects in a JSON file. Copying, comparing and writing JSON recurse, and Python
allows some hundred levels; no config has more than ten."""

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "is a folder"),
    (stat.S_ISFIFO, errno.EINVAL, "is a named pipe"),
    (stat.S_ISSOCK, errno.EINVAL, "is a socket"),
    (stat.S_ISCHR, errno.EINVAL, "is a device"),
    (stat.S_ISBLK, errno.EINVAL, "is a device"),
)


def os_reason(error: OSError) -> str:
    """Return the operating system's reason in lower case: `permission denied`, `is a directory`."""
    return (error.strerror or type(error).__name__).lower()


def exists(path: str | Path) -> bool:
    """Return whether a path exists; False for names that no file can have."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def open_regular(file: Path) -> BufferedReader:
    """Open a regular file for reading.

    Untrusted files must be opened with this function: reading a named pipe without a writer waits forever, and a device
    may have no end.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be opened, or is a folder, a pipe, a socket or a device; `strerror` says which.
    """
    try:
        # Check the kind before opening, since opening a device can have side effects.
        _require_regular(file.stat().st_mode, file)
        # If a pipe takes the file's place in between, O_NONBLOCK keeps the call from waiting for a writer.
        descriptor = open_binary(file, os.O_RDONLY | NO_BLOCKING)
    except ValueError:  # a NUL character or a lone surrogate
        raise FileNotFoundError(errno.ENOENT, "no file can have this name", repr(str(file))) from None
    try:
        _require_regular(os.fstat(descriptor).st_mode, file)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_regular(mode: int, file: Path) -> None:
    if stat.S_ISREG(mode):
        return
    code, kind = next(((c, kind) for is_kind, c, kind in _KINDS if is_kind(mode)), (errno.EINVAL, "is not a file"))
    raise OSError(code, f"{kind}, where a regular file is needed", str(file))


def read_file(file: Path, limit: int) -> bytes:
    """Read a regular file whole.

    Args:
        file: The file.
        limit: Largest number of bytes.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read, is not a regular file, or is larger than `limit`; `strerror` says which.
    """
    with open_regular(file) as handle:
        # Request no more than the size, since `read` allocates as much as it is asked for.
        data = handle.read(min(os.fstat(handle.fileno()).st_size, limit) + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit:,} bytes, the most that is accepted here", str(file))
    return data


def _integer(text: str) -> int:
    # converting a million digits would take seconds
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """Return a key that an object has twice, given its keys and values as json's `object_pairs_hook` does; None without one."""
    if len(dict(pairs)) == len(pairs):
        return None
    return Counter(key for key, _ in pairs).most_common(1)[0][0]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated_key(pairs)
    if twice is not None:
        raise ValueError(f"key {twice!r} appears twice")
    return dict(pairs)


def _parse(text: str, duplicates: bool) -> Any:
    # Hooks are called for every number and object, which doubles the time of a large header. Avoid them if Python
    # itself refuses numbers of thousands of digits (not in early releases of 3.10).
    if hasattr(sys, "get_int_max_str_digits") and _LONG_NUMBER.search(text) is None:
        with suppress(ValueError):  # parse again below, for a better message
            parsed = json.loads(text)
            # Each key is followed by a colon, so if there are as many keys as colons, no key was overwritten.
            if duplicates or (isinstance(parsed, dict) and text.count(":") == _keys(parsed)):
                return parsed
    hook: Callable[[list[tuple[str, Any]]], Any] = dict if duplicates else _unique
    return json.loads(text, object_pairs_hook=hook, parse_int=_integer)


def _keys(parsed: dict[str, Any]) -> int:
    """Count the keys of an object and of its direct child objects, but not of deeper ones."""
    return len(parsed) + sum(len(value) for value in parsed.values() if isinstance(value, dict))


def parse_object(data: bytes, where: str, *, duplicates: bool = False) -> dict[str, Any]:
    """Parse `data` as one JSON object.

    Args:
        data: UTF-8 text.
        where: what the text is, for messages.
        duplicates: whether a key may appear twice (the last one counts).

    Raises:
        CheckpointError: the text is not UTF-8, not JSON, nested too deeply or not an object.
    """
    return _object(_parse_json(data, where, duplicates), where)


def _parse_json(data: bytes, where: str, duplicates: bool) -> Any:
    def bad(reason: str) -> NoReturn:
        raise CheckpointError(f"{where}: {reason}") from None

    try:
        return _parse(data.decode("utf-8"), duplicates)
    except UnicodeDecodeError as error:
        bad(f"is not UTF-8 text (byte {error.start})")
    except json.JSONDecodeError as error:
        bad(f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except RecursionError:
        bad("is nested too deeply")
    except ValueError as error:
        bad(f"is not acceptable JSON: {error}")


def _object(parsed: object, where: str) -> dict[str, Any]:
    if not isinstance(parsed, dict):
        kind = _JSON_NAMES.get(type(parsed), type(parsed).__name__)
        raise CheckpointError(f"{where}: must be a JSON object, found {kind}")
    return parsed


_JSON_NAMES: dict[type, str] = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: It cannot be read, is too large, not JSON, or nested too deeply.
    """
    return _parse_file(read_bytes(file), str(file))


def read_bytes(file: Path) -> bytes:
    """Read the bytes of a JSON file.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: It cannot be read, or is too large.
    """
    try:
        return read_file(file, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise NotFoundError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None


def _parse_file(data: bytes, file: str) -> Any:
    parsed = _parse_json(data.removeprefix(b"\xef\xbb\xbf"), file, duplicates=True)
    if _depth_exceeds(parsed, MAX_DEPTH):
        raise CheckpointError(f"{file}: is nested too deeply: at most {MAX_DEPTH} levels are accepted")
    return parsed


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that must hold one object.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: It cannot be read, is too large, not JSON, nested too deeply or not an object.
    """
    return parse_object_file(read_bytes(file), str(file))


def parse_object_file(data: bytes, file: str) -> dict[str, Any]:
    """Parse the bytes of a JSON file that must hold one object, as `read_object` does.

    Args:
        data: The bytes.
        file: Its path, for messages.

    Raises:
        CheckpointError: It is not JSON, nested too deeply or not an object.
    """
    return _object(_parse_file(data, file), file)


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Return whether lists and objects are nested in more than `limit` levels; without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


T = TypeVar("T")


class Entry:
    """A parsed JSON value and its place in the file.

    Every method that returns a value raises CheckpointError, naming the place, if the value has another type.

    Args:
        value: The parsed value.
        file: Name of the file, for messages.
        place: Place of the value in the file, such as `layers[3].models`; empty for the whole file.
    """

    __slots__ = ("_file", "_value", "place")

    def __init__(self, value: Any, file: str, place: str = "") -> None:
        self._value = value
        self._file = file
        self.place = place

    @property
    def where(self) -> str:
        """File and place."""
        return f"{self._file}: {self.place}" if self.place else self._file

    def __getitem__(self, key: str) -> Entry:
        entry = self.get(key)
        if entry is None:
            raise CheckpointError(f"{self.where}: has no {key!r}, which every such file has; is it complete?")
        return entry

    def get(self, key: str) -> Entry | None:
        """Return the entry under a key of an object; None if the key is missing or its value is null."""
        if not isinstance(self._value, dict):
            self.refuse("an object")
        value = self._value.get(key)
        return None if value is None else Entry(value, self._file, f"{self.place}.{key}" if self.place else key)

    def names(self) -> list[str]:
        """Return the keys of an object."""
        if not isinstance(self._value, dict):
            self.refuse("an object")
        return list(self._value)

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Yield the keys and entries of an object, except those whose value is null."""
        for key in self.names():
            entry = self.get(key)
            if entry is not None:
                yield key, entry

    def is_list(self) -> bool:
        """Return whether the value is a list."""
        return isinstance(self._value, list)

    def each(self, read: Callable[[Entry], T]) -> list[T]:
        """Read every member of a list."""
        if not isinstance(self._value, list):
            self.refuse("a list")
        return [read(Entry(value, self._file, f"{self.place}[{i}]")) for i, value in enumerate(self._value)]

    def text(self) -> str:
        """Return a string."""
        return self._value if isinstance(self._value, str) else self.refuse("a text")

    def flag(self) -> bool:
        """Return true or false."""
        return self._value if isinstance(self._value, bool) else self.refuse("true or false")

    def whole(self) -> int:
        """Return a whole number of at least 0."""
        number = self._value
        return (
            number
            if isinstance(number, int) and not isinstance(number, bool) and number >= 0
            else self.refuse("a whole number")
        )

    def number(self) -> float:
        """Return a finite number."""
        number = self._value
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            self.refuse("a finite number")
        return float(number)

    def maybe(self) -> float | None:
        """Return a finite number, or None for null."""
        return None if self._value is None else self.number()

    def plain(self) -> Any:
        """Return a value of any type as it is."""
        return self._value

    def shown(self) -> str:
        """Return a value of any type as text: a string as it is, anything else as JSON."""
        return self._value if isinstance(self._value, str) else json.dumps(self._value)

    def refuse(self, expected: str) -> NoReturn:
        """Raise CheckpointError with the kind of value that was expected here.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(f"{self.where}: must be {expected}, found {brief(self._value, 60)}")
