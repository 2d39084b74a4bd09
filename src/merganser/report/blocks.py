"""What a report consists of, whether it is drawn as a page or printed in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.stored import Estimate
from ..wording import number_text

__all__ = ["Block", "Cell", "Code", "Figure", "List", "Number", "Paragraph", "Section", "Table", "estimate", "number"]


@dataclass(frozen=True, slots=True)
class Number:
    """A measured number.

    Args:
        value: As it was read; None where there is none.
        text: As it is shown.
        place: Where the file says so, such as `layers[3].models[0]`; empty for what is no measurement.
        shade: From -1 to 1, how strongly its cell is coloured; None: not.
    """

    value: float | None
    text: str
    place: str = ""
    shade: float | None = None


Cell = str | Number


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a head.

    Args:
        head: One text for each column; all empty for a table without a head.
        rows: Cells.
        source: File and place of its numbers.
        caption: What it shows.
        folded: Whether a page shows it on request alone, and a terminal not at all.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    source: str = ""
    caption: str = ""
    folded: bool = False

    def numeric(self, column: int) -> bool:
        """Whether most of a column are numbers."""
        return 2 * sum(isinstance(row[column], Number) for row in self.rows) > len(self.rows)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure.

    Args:
        title: What it shows.
        data: Traces of plotly.
        layout: Layout of plotly.
        height: In pixels.
        lines: The same for a terminal.
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
    """Messages under a word: warnings, notes."""

    kind: str
    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Code:
    """Text to be shown as it is."""

    text: str


Block = Table | Figure | Paragraph | List | Code


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part."""

    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def number(value: float | None, place: str, *, shade: float | None = None) -> Number:
    """Show a number with three digits."""
    return Number(value, number_text(value), place, shade)


def estimate(found: Estimate | None, *, percent: bool = False) -> Cell:
    """Show a number with its standard error: `0.4071 ± 0.0102`, `66.3 ± 2.1 %`."""
    if found is None or found.value is None:
        return Number(None, "-", "" if found is None else found.place)
    scale, digits, unit = (100, 1, " %") if percent else (1, 4, "")
    error = "" if found.stderr is None else f" ± {scale * found.stderr:.{digits}f}"
    return Number(found.value, f"{scale * found.value:.{digits}f}{error}{unit}", found.place)
