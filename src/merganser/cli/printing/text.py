"""Format words and numbers, and print them: data to stdout, everything else to stderr.

All output of the command line goes through this module, which escapes control characters for the terminal.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from shutil import get_terminal_size
from typing import Any, TextIO

import typer

from ...errors import OutputError
from ...jsonfile import os_reason
from ...wording import (
    count_text,
    digits_text,
    number_text,
    plural,
    printable,
    printable_json,
    size_text,
    some,
    time_text,
)

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
_NARROWEST = 40  # columns below which breaking lines makes them no easier to read
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def say(text: str = "") -> None:
    """Print a line of data.

    Raises:
        OutputError: Standard output cannot be written, for example to a full disk. All functions that print data raise
            it.
    """
    with writing():
        typer.echo(fitted(printable(text), sys.stdout))


def fitted(text: str, stream: TextIO, before: int = 0) -> str:
    """Break lines between words where a terminal is narrower; for files and pipes they stay, and can be searched.

    Args:
        text: One line or several.
        stream: Where it is printed.
        before: Characters that are in front of the first already; what is broken goes on below its first word.
    """
    columns = get_terminal_size().columns
    if columns < _NARROWEST or not stream.isatty():
        return text
    lines = (" " * before + text).split("\n")
    return "\n".join(_broken(line, columns, before) for line in lines)[before:]


def _broken(line: str, columns: int, before: int) -> str:
    indent = " " * (before or len(line) - len(line.lstrip()) + 4)
    broken = textwrap.wrap(
        line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, tabsize=1
    )
    return "\n".join(broken) if len(line) > columns else line


def head(text: str) -> None:
    """Print a heading."""
    with writing():
        typer.secho(printable(text), bold=True)


def complain(kind: str, text: str) -> None:
    """Print an error, a warning or a note to stderr; do nothing if stderr cannot be written."""
    try:
        typer.secho(f"{kind}: ", nl=False, err=True, fg=_COLOURS[kind], bold=True)
        typer.echo(fitted(printable(text), sys.stderr, len(f"{kind}: ")), err=True)
    except OSError:
        discard(sys.stderr)


class _Complaints(logging.Handler):
    """Prints what is logged as warnings of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        complain("warning", record.getMessage())


@contextmanager
def telling() -> Iterator[None]:
    """Print what the package logs."""
    logger, handler = logging.getLogger(__package__.partition(".")[0]), _Complaints(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def complain_at_length(error: BaseException) -> None:
    """Print the traceback of an error to stderr."""
    for line in "".join(traceback.format_exception(error)).rstrip("\n").split("\n"):
        typer.echo(printable(line), err=True)


@contextmanager
def writing() -> Iterator[None]:
    """Turn an error while writing standard output into an `OutputError`.

    Raises:
        OutputError: Standard output cannot be written.
        BrokenPipeError: The reader closed the pipe.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise OutputError(f"standard output: cannot be written: {os_reason(error)}") from None


def discard(stream: TextIO) -> None:
    """Redirect a stream to nowhere; otherwise Python would try to write its buffer again at exit, and complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_json(value: object) -> None:
    """Print one JSON document."""
    with writing():
        typer.echo(printable_json(json.dumps(value, indent=1, default=_plain, allow_nan=False, ensure_ascii=False)))


def _plain(value: object) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def passes_text(count: int) -> str:
    """Return `1 pass` or `up to 3 passes`: small tensors need only one."""
    return "1 pass" if count == 1 else f"up to {count} passes"


def share_text(part: float, whole: float) -> str:
    """Return the size relative to a full copy: `6.3% of a copy`."""
    return f"{digits_text(100 * part / max(whole, 1), 3)}% of a copy"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "  ") -> list[str]:
    """Align columns; cells are never truncated or wrapped, so that output can be searched.

    Args:
        rows: The cells; the last one of a row may have any length.
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
    """Parse a number of bytes: `5GB`, `500 MB`, `1GiB`, `1000000`.

    Raises:
        typer.BadParameter: The text is not a number of bytes.
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
    """Return whether stderr is a terminal."""
    return sys.stderr.isatty()
