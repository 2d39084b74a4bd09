"""Format numbers, lists and untrusted text for people."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

__all__ = [
    "brief",
    "count_text",
    "digits_text",
    "html_table",
    "measured_text",
    "number_text",
    "plural",
    "printable",
    "printable_json",
    "setting_text",
    "size_text",
    "some",
    "time_text",
    "unique_names",
]

# control characters (C0, DEL, C1), zero-width characters, changes of the writing direction, Unicode line separators,
# lone surrogates, tags
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Return a text as one line that is safe to print: characters that move, hide or recolour text are escaped.

    Names of tensors, models and files are untrusted; an escape sequence in one could rewrite earlier output.
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def printable_json(text: str) -> str:
    """Return a JSON document with such characters as JSON escapes; line breaks and meaning stay the same."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1], text)


def brief(value: object, limit: int = 80) -> str:
    """Return the repr of an untrusted value, cut off at `limit` characters, since it may have a million entries."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def size_text(count: float) -> str:
    """Format a number of bytes: `1.08 GB`."""
    return _scaled(count, ("bytes", "KB", "MB", "GB", "TB"))


def count_text(count: float) -> str:
    """Format a count: `4,096`, `494 M`."""
    return f"{count:,.0f}" if count < 10_000 else _scaled(count, ("", "K", "M", "B", "T"))


def _scaled(count: float, units: Sequence[str]) -> str:
    if count < 1000:
        return f"{count:.0f} {units[0]}"
    for unit in units[1:]:
        count /= 1000
        if count < 999.5 or unit == units[-1]:
            break
    return f"{count:.{2 if count < 9.995 else 1 if count < 99.95 else 0}f} {unit}"


def time_text(seconds: float) -> str:
    """Format a duration: `7.2 s`, `2 min 10 s`, `1 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, thing: str) -> str:
    """Format a count with its noun: `1 file`, `2 files`, `12,345 tensors`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def digits_text(value: float, digits: int = 2) -> str:
    """Format a number with so many significant digits, and no exponent below 10^15: `0.012`, `3.8`, `120`."""
    return f"{float(f'{value:.{digits}g}'):.15g}"


def number_text(value: float | None) -> str:
    """Format a measured number with three significant digits; None gives `-`."""
    return "-" if value is None else digits_text(value, 3)


def measured_text(value: float, stderr: float | None) -> str:
    """Format a measured number with four decimals, and its standard error where it is known: `0.4983 ±0.0336`."""
    return f"{value:.4f}" + ("" if stderr is None else f" ±{stderr:.4f}")


def setting_text(value: object) -> str:
    """Format a value of a recipe: numbers with four significant digits."""
    return digits_text(value, 4) if isinstance(value, float) else str(value)


def some(names: Sequence[str], limit: int = 4) -> str:
    """Join names with commas; beyond `limit` names, only their number is given: `a, b and 3 more`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def html_table(caption: str, rows: Sequence[Sequence[str]]) -> str:
    """Return a small table for notebooks; all cells are plain text.

    Args:
        caption: A line above it.
        rows: The cells.
    """
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><tbody>{body}</tbody></table>"


def default_names(references: Sequence[str]) -> list[str]:
    """Return a short, unique name for each model: the last part of its path, with as many parent parts as needed.

    Args:
        references: Distinct references to models: paths, Hub ids and the like.
    """
    return unique_names([_parts(reference) for reference in references])


def unique_names(parts: Sequence[Sequence[str]]) -> list[str]:
    """Return the last part of each path, with as many parent parts as make it unique.

    Args:
        parts: The parts of each path, one or more.
    """
    names = [each[-1] for each in parts]
    for count in range(2, max(map(len, parts), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = ["/".join(each[-count:]) if name in twice else name for name, each in zip(names, parts, strict=True)]
    return names


def _parts(reference: str) -> list[str]:
    # os.path.exists returns False for a name that is too long for a file; Path.exists raises.
    path = reference if os.path.exists(reference) else reference.rpartition("+")[2]  # noqa: PTH110
    parts = [part for part in Path(path).parts if part not in ("/", ".", "..")]
    if parts and parts[-1].endswith((".yaml", ".yml", ".safetensors")):
        parts[-1] = parts[-1].rpartition(".")[0]
    return parts or [reference]
