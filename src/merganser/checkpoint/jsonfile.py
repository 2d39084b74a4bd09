"""JSON from files that others wrote: bounded, strict, with errors that name the place."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from merganser.errors import CheckpointError, NotFoundError

__all__ = ["LFS_MAGIC", "LFS_POINTER", "MAX_JSON_BYTES", "os_reason", "parse_object", "read_object"]

MAX_JSON_BYTES = 100_000_000
"""The most JSON that is ever parsed; the safetensors format sets the same limit for its header."""

LFS_MAGIC = b"version "
"""What a Git LFS pointer begins with: a clone without Git LFS has these few lines in place of each large file."""

LFS_POINTER = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or fetch the file again"

_MAX_DIGITS = 20


def os_reason(error: OSError) -> str:
    """Return the operating system's reason in lower case: `permission denied`, `is a directory`."""
    return (error.strerror or type(error).__name__).lower()


def _integer(text: str) -> int:
    # Converting a million digits takes seconds: a trap, since no size or count needs more than 64 bits.
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice!r} appears twice")
    return found


def _parse(text: str, duplicates: bool) -> Any:
    # Hooks are called for every number and object: they double the time of a large header. Python itself refuses
    # numbers of thousands of digits, but for early releases of 3.10.
    if hasattr(sys, "get_int_max_str_digits"):
        with suppress(ValueError):  # said better below
            parsed = json.loads(text)
            # Every key has a colon behind it: as many keys as colons means that none was there twice.
            if duplicates or (isinstance(parsed, dict) and text.count(":") == _keys(parsed)):
                return parsed
    hook: Callable[[list[tuple[str, Any]]], Any] = dict if duplicates else _unique
    return json.loads(text, object_pairs_hook=hook, parse_int=_integer)


def _keys(parsed: dict[str, Any]) -> int:
    """Count the keys of an object and of the objects in it; deeper ones are not counted."""
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

    def bad(reason: str) -> NoReturn:
        raise CheckpointError(f"{where}: {reason}") from None

    try:
        parsed = _parse(data.decode("utf-8"), duplicates)
    except UnicodeDecodeError as error:
        bad(f"is not UTF-8 text (byte {error.start})")
    except json.JSONDecodeError as error:
        bad(f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except RecursionError:
        bad("is nested too deeply")
    except ValueError as error:
        bad(f"is not acceptable JSON: {error}")
    if not isinstance(parsed, dict):
        bad(f"must be a JSON object, found {_JSON_NAMES.get(type(parsed), type(parsed).__name__)}")
    return parsed


_JSON_NAMES: dict[type, str] = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that must hold one object.

    Raises:
        NotFoundError: there is no such file.
        CheckpointError: it cannot be read, is too large or is not a JSON object.
    """
    try:
        with file.open("rb") as handle:
            # no more than there is: as much memory is taken as is asked for
            data = handle.read(min(os.fstat(handle.fileno()).st_size, MAX_JSON_BYTES) + 1)
    except FileNotFoundError:
        raise NotFoundError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{file}: is larger than {MAX_JSON_BYTES:,} bytes, the most that is accepted for JSON")
    return parse_object(data.removeprefix(b"\xef\xbb\xbf"), str(file), duplicates=True)
