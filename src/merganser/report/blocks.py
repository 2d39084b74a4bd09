"""The elements of a report, for both the HTML page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.stored import Estimate
from ..wording import number_text

__all__ = [
    "Block",
    "Cell",
    "Code",
    "Figure",
    "List",
    "Number",
    "Paragraph",
    "Section",
    "Table",
    "estimate",
    "number",
    "share",
]


@dataclass(frozen=True, slots=True)
class Number:
    """A measured number.

    Args:
        value: The value as it was read; None if there is none.
        text: The value as shown.
        place: Its place in the file, such as `layers[3].models[0]`; empty if it was not read from one.
        shade: Strength of the colour of its cell, from -1 to 1; None for no colour.
    """

    value: float | None
    text: str
    place: str = ""
    shade: float | None = None


Cell = str | Number


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Args:
        head: Heading of each column; all empty for a table without headings.
        rows: Cells.
        source: File and place of its numbers.
        caption: What it shows.
        folded: Whether the page shows it only after a click; the terminal then omits it.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    source: str = ""
    caption: str = ""
    folded: bool = False

    def numeric(self, column: int) -> bool:
        """Return whether most cells of a column are numbers."""
        return 2 * sum(isinstance(row[column], Number) for row in self.rows) > len(self.rows)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure.

    Args:
        title: What it shows.
        data: Traces of plotly.
        layout: Layout of plotly.
        height: Height in pixels.
        lines: Lines of text that replace the figure in a terminal.
        source: File and place of its numbers.
    """

    title: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    height: int
    lines: Sequence[str]
    source: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A sentence or two."""

    text: str


@dataclass(frozen=True, slots=True)
class List:
    """A list of messages with a heading, such as warnings."""

    kind: str
    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Code:
    """Preformatted text."""

    text: str


Block = Table | Figure | Paragraph | List | Code


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the report, with its title."""

    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def number(value: float | None, place: str, *, shade: float | None = None) -> Number:
    """Return a number shown with three significant digits."""
    return Number(value, number_text(value), place, shade)


def estimate(found: Estimate | None, *, percent: bool = False) -> Cell:
    """Return a number shown with its standard error: `0.4071 ± 0.0102`, `66.3 ± 2.1 %`."""
    if found is None or found.value is None:
        return Number(None, "-", "" if found is None else found.place)
    scale, digits, unit = (100, 1, " %") if percent else (1, 4, "")
    error = "" if found.stderr is None else f" ± {scale * found.stderr:.{digits}f}"
    return Number(found.value, f"{scale * found.value:.{digits}f}{error}{unit}", found.place)


def share(found: Estimate) -> str:
    """Return a share with its standard error: `66.3 ± 2.1 %`."""
    cell = estimate(found, percent=True)
    return cell if isinstance(cell, str) else cell.text
