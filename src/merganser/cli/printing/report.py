"""A report in a terminal of 80 columns."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...wording import printable
from .text import head, say, table

if TYPE_CHECKING:
    from ...report import Report
    from ...report.blocks import Block, Cell, Table

__all__ = ["print_report"]

_WIDTH = 80


def print_report(report: Report) -> None:
    """Print a report; lines are at most 80 characters long, except for paths, hashes and the recipe."""
    head(report.title)
    _wrapped(report.lead)
    for section in report.sections:
        say()
        head(section.title)
        for block in section.blocks:
            _block(block)


def _block(block: Block) -> None:
    from ...report.blocks import Code, Figure, List, Table

    if isinstance(block, Table):
        if not block.folded:
            _table(block)
    elif isinstance(block, Figure):
        _wrapped(block.title)
        for line in block.lines:
            _wrapped(line, "    ")
    elif isinstance(block, List):
        say(block.kind)
        for text in block.texts:
            _wrapped(f"  {text}", "    ")
    elif isinstance(block, Code):
        for line in block.text.rstrip().splitlines():
            _command(line) if line.startswith("merganser ") else say(f"  {line}")
    else:
        _wrapped(block.text)


def _wrapped(text: str, later: str = "") -> None:
    if len(text) <= _WIDTH:
        say(text)
        return
    for line in textwrap.wrap(
        printable(text), _WIDTH, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    ):
        say(line)


def _command(line: str) -> None:
    """Print a command line, broken between its words as a shell allows."""
    words, lines = shlex.split(line, posix=False), [" "]
    for word in words:
        if len(lines[-1]) + len(word) > _WIDTH - 4 and lines[-1].strip():
            lines.append("   ")
        lines[-1] += f" {word}"
    for text in lines[:-1]:
        say(f"{text} \\")
    say(lines[-1])


def _table(block: Table) -> None:
    """Print a table; a wide one as several below each other, with as many columns as fit, and the first in each."""
    if block.caption:
        _wrapped(block.caption)
    rows = [[_cell(cell) for cell in row] for row in block.rows]
    right = [i for i in range(len(block.head)) if block.numeric(i)]
    if any(block.head):
        rows = [list(block.head), *rows]
    rest = list(range(1, len(block.head)))
    while True:
        count = _fitting(rows, right, rest)
        for line in _lines(rows, right, rest[:count]) if count else _below(rows, rest[0]):
            say(line)
        rest = rest[max(count, 1) :]
        if not rest:
            return


def _fitting(rows: Sequence[Sequence[str]], right: Sequence[int], columns: Sequence[int]) -> int:
    """Return how many of the columns fit beside the first column."""
    for count in range(len(columns), 0, -1):
        if all(len(line) <= _WIDTH for line in _lines(rows, right, columns[:count])):
            return count
    return 0


def _below(rows: Sequence[Sequence[str]], column: int) -> list[str]:
    """Return the lines of two columns that are too wide to stand beside each other: one below the other."""
    return [f"{indent}{printable(row[i])}" for row in rows for indent, i in (("  ", 0), ("    ", column))]


def _lines(rows: Sequence[Sequence[str]], right: Sequence[int], columns: Sequence[int]) -> list[str]:
    chosen = [0, *columns]
    at_right = [i for i, column in enumerate(chosen) if column in right]
    return table([[row[column] for column in chosen] for row in rows], right=at_right)


def _cell(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell.text
