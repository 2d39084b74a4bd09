"""Words and numbers as people read them, and where they go: data to stdout, everything else to stderr.

All that the command line prints goes through here, where foreign texts are made safe for a terminal.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import typer

from ..errors import OutputError
from ..jsonfile import os_reason
from ..wording import count_text, number_text, plural, printable, printable_json, size_text, some, time_text

__all__ = [
    "complain",
    "complain_at_length",
    "count_text",
    "discard",
    "head",
    "number_text",
    "on_terminal",
    "parse_size",
    "passes_text",
    "plural",
    "say",
    "say_json",
    "size_text",
    "some",
    "table",
    "time_text",
    "writing",
]

_COLOURS = {"error": typer.colors.RED, "warning": typer.colors.YELLOW, "note": typer.colors.CYAN}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def say(text: str = "") -> None:
    """Print a line of data.

    Raises:
        OutputError: Standard output cannot be written, as when it is a file on a full disk; so for all that print data.
    """
    with writing():
        typer.echo(printable(text))


def head(text: str) -> None:
    """Print a heading."""
    with writing():
        typer.secho(printable(text), bold=True)


def complain(kind: str, text: str) -> None:
    """Print an error, a warning or a note to stderr; where nothing can be printed there, nobody can be told."""
    try:
        typer.secho(f"{kind}: ", nl=False, err=True, fg=_COLOURS[kind], bold=True)
        typer.echo(printable(text), err=True)
    except OSError:
        discard(sys.stderr)


def complain_at_length(error: BaseException) -> None:
    """Print where an error came from, to stderr."""
    for line in "".join(traceback.format_exception(error)).rstrip("\n").split("\n"):
        typer.echo(printable(line), err=True)


@contextmanager
def writing() -> Iterator[None]:
    """Turn an error of standard output into one that says so.

    Raises:
        OutputError: It cannot be written.
        BrokenPipeError: Whoever read it has enough.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise OutputError(f"standard output: cannot be written: {os_reason(error)}") from None


def discard(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere: Python would try to write it, and complain, once more when it exits."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_json(value: Any) -> None:
    """Print one JSON document."""
    with writing():
        typer.echo(printable_json(json.dumps(value, indent=1, default=_plain, allow_nan=False, ensure_ascii=False)))


def _plain(value: object) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def passes_text(count: int) -> str:
    """Write `1 pass`, `up to 3 passes`: what is small is read once."""
    return "1 pass" if count == 1 else f"up to {count} passes"


def share_text(part: float, whole: float) -> str:
    """Write what a copy would have cost: `6.3% of a copy`."""
    return f"{100 * part / max(whole, 1):.3g}% of a copy"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "  ") -> list[str]:
    """Align columns; nothing is ever cut off or wrapped, so that output can be searched.

    Args:
        rows: The cells; the last one of a row may be as long as it likes.
        right: Columns that are aligned to the right.
        indent: Start of each line.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


def parse_size(text: str) -> int:
    """Read a number of bytes: `5GB`, `500 MB`, `1GiB`, `1000000`.

    Raises:
        typer.BadParameter: It is none.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS:
        hint = ""
        if match is not None and unit in ("B", "M", "K", "G"):
            known = {"B": "GB, as mergekit means it"}.get(unit, f"{unit}B")
            hint = f" Did you mean {match[1]}{known}?"
        raise typer.BadParameter(f"expected a size such as 5GB, 500MB, 1GiB or a number of bytes, got {text!r}.{hint}")
    size = float(match[1]) * _UNITS[unit]
    if size >= 2**63:
        raise typer.BadParameter(f"expected a size below 8 EiB, got {text[:40]!r}")
    if size < 1:
        raise typer.BadParameter(f"expected a size of at least 1 byte, got {text!r}")
    return int(size)


def on_terminal() -> bool:
    """Whether somebody watches stderr."""
    return sys.stderr.isatty()
