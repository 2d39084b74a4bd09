"""How the plain scalars of a recipe are read, and which strings are refused."""

from __future__ import annotations

import math
import re
from typing import TypeAlias

Scalar: TypeAlias = "str | int | float | bool | None"

MAX_INTEGER = 2**63
MAX_DIGITS = 100

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
"""Control characters, which no name or path should contain."""

_SHOWN = 60

# mergekit users write 1e-4, which YAML 1.1 reads as a string
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
FLOAT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NULLS = ("", "~", "null", "Null", "NULL")
FLAGS = {
    spelling: value
    for word, value in [("yes", True), ("no", False), ("true", True), ("false", False), ("on", True), ("off", False)]
    for spelling in (word, word.capitalize(), word.upper())
}


def read_scalar(text: str) -> Scalar:
    """Return the value of an unquoted scalar: as YAML 1.1 reads it, but `1e-4` is a number.

    Raises:
        ValueError: The number is infinite, NaN, or an integer beyond 64 bits.
    """
    if text in _NULLS:
        return None
    if text in FLAGS:
        return FLAGS[text]
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{shown(text)} is not a finite number")
    if not FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_DIGITS:
        # Python converts thousands of digits slowly or not at all
        raise ValueError("a number of too many digits; if it is a text, put it in quotes")
    if _INTEGER.fullmatch(text):
        return finite(int(text.replace("_", "")))
    return finite(float(text.replace("_", "")))


def finite(number: int | float) -> int | float:
    """Return the number; refuse infinity, NaN and integers beyond 64 bits."""
    if isinstance(number, int) and abs(number) >= MAX_INTEGER:
        raise ValueError("a number of too many digits; if it is a text, put it in quotes")
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a finite number")
    return number


def why_no_text(text: str) -> str | None:
    """Return why a string cannot be written to a file or a message; None if it can."""
    if "\0" in text:
        return "this text holds a NUL character (\\0), which no path or name can have"
    if _SURROGATE.search(text):
        return "this text holds half a surrogate pair (\\ud800 to \\udfff), which is not a character"
    return None


def shown(value: object) -> str:
    """Return a value as messages quote it: shortened, and only the type of lists and mappings."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        # Python refuses to print thousands of digits
        return "a number of too many digits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]}...{text[0] if isinstance(value, str) else ''}"
