"""Render a report as one self-contained HTML file: no server, no network."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from functools import cache, partial
from html import escape
from importlib.resources import files
from typing import Any

from ..errors import UnsupportedError
from ..record.format import PAGE_GENERATOR
from ..version import __version__
from .blocks import Block, Cell, Code, Figure, List, Number, Section, Table

__all__ = ["render"]

_LONG = 28
"""Number of characters above which the text of a cell (a path, a hash) may be broken anywhere."""


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the page as HTML.

    Args:
        title: Name of the merge.
        lead: A line below the title.
        sections: From `sections.sections`.

    Raises:
        UnsupportedError: plotly is not installed.
    """
    plotly = _packed_plotly(_plotly())
    figures: list[Figure] = []
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']
    for i, section in enumerate(sections):
        parts.append(f'<section id="s{i}"><h2>{escape(section.title)}</h2>')
        parts += [_block(block, figures) for block in section.blocks]
        parts.append("</section>")
        if i == 0:
            # the first section is what most readers came for, so even on a phone nothing stands above it
            parts.append(_contents(sections))
    package_files = files(__package__)
    style, script = ((package_files / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'{PAGE_GENERATOR}{escape(__version__)}">',
            f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>",
            *parts,
            f'<p class="source">merganser {escape(__version__)}: report</p>',
            _packed("figures", json.dumps([_json(f) for f in figures], allow_nan=False, separators=(",", ":"))),
            plotly,
            f"<script>\n{script}</script>\n</body>\n</html>\n",
        ]
    )


@cache
def _packed_plotly(text: str) -> str:
    """Return the element with plotly.js; packing it takes a second or two, which many pages of one process pay once."""
    return _packed("plotly", text)


def _plotly() -> str:
    """Return the source of plotly.js.

    Raises:
        UnsupportedError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UnsupportedError(
            "report: figures need plotly, which is not installed; pip install 'merganser[report]', "
            "or print the report with --text"
        ) from None
    text: str = get_plotlyjs()
    return text


def _packed(name: str, text: str) -> str:
    """Return an element with a text that page.js unpacks; plotly is 4.8 MB, and a third of that here.

    It is deflated and in base 85; of its characters, `<` and `&` are replaced by two that it does not use, so that no
    browser finds markup in it.
    """
    digits = base64.b85encode(zlib.compress(text.encode(), 9)).decode("ascii").translate({60: ",", 38: "."})
    return f'<script type="text/plain" id="{name}">{digits}</script>'


def _contents(sections: Sequence[Section]) -> str:
    links = (f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(sections))
    return f"<nav>{' '.join(links)}</nav>"


def _block(block: Block, figures: list[Figure]) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _figure(block, figures)
    if isinstance(block, Code):
        return f"<pre>{escape(block.text)}</pre>"
    if isinstance(block, List):
        items = "".join(f"<li>{escape(text)}</li>" for text in block.texts)
        return f'<div class="list"><b>{escape(block.kind)}</b><ul>{items}</ul></div>'
    return f"<p>{escape(block.text)}</p>"


def _table(table: Table) -> str:
    width = len(table.head)
    right = [table.numeric(i) for i in range(width)]
    head = "".join(f"<th{_class(r)}>{escape(text)}</th>" for text, r in zip(table.head, right, strict=True))
    # a folded table may have thousands of cells; exact values and places would double the page
    cells = (map(partial(_cell, exactly=not table.folded), row, right) for row in table.rows)
    rows = "".join(f"<tr>{''.join(row)}</tr>\n" for row in cells)
    top = f"<thead><tr>{head}</tr></thead>" if any(table.head) else ""
    caption = f"<h3>{escape(table.caption)}</h3>" if table.caption and not table.folded else ""
    text = f'{caption}<div class="wide"><table>{top}<tbody>\n{rows}</tbody></table></div>{_source(table.source)}'
    return f"<details><summary>{escape(table.caption)}</summary>{text}</details>" if table.folded else text


def _class(right: bool) -> str:
    return ' class="n"' if right else ""


def _cell(cell: Cell, right: bool, exactly: bool) -> str:
    if isinstance(cell, str):
        names, style, exact = ["long"] if len(cell) > _LONG else [], "", ""
    else:
        names = ["minus"] if cell.shade is not None and cell.shade < 0 else []
        style = "" if cell.shade is None else f' style="--s:{min(abs(cell.shade), 1):.3f}"'
        exact = "" if cell.value is None or not exactly else f' title="{escape(_exact(cell))}"'
    names += ["n"] if right else []
    kind = f' class="{" ".join(names)}"' if names else ""
    return f"<td{kind}{style}{exact}>{escape(cell if isinstance(cell, str) else cell.text)}</td>"


def _exact(cell: Number) -> str:
    """Return the number with all digits, and its place in the file."""
    return f"{cell.value!r} ({cell.place})" if cell.place else repr(cell.value)


def _figure(figure: Figure, figures: list[Figure]) -> str:
    figures.append(figure)
    return (
        f'<figure><h3>{escape(figure.title)}</h3><div class="plot" data-figure="{len(figures) - 1}" '
        f'style="height:{figure.height}px"><noscript>Figures need JavaScript; the tables do not.</noscript></div>'
        f"{_source(figure.source)}</figure>"
    )


def _json(figure: Figure) -> dict[str, Any]:
    return {"data": figure.data, "layout": figure.layout}


def _source(text: str) -> str:
    return f'<p class="source">{escape(text)}</p>' if text else ""
