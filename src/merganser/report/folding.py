"""Write the home folder as `~`, so that a report that is shared does not show names of accounts and folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .blocks import Block, Cell, Code, Figure, List, Paragraph, Section, Table

__all__ = ["folded"]


def folded(section: Section) -> Section:
    """Return a section in whose texts the home folder is `~`."""
    return Section(section.title, [_block(block) for block in section.blocks])


def _text(text: str) -> str:
    try:
        home = str(Path.home())
    except RuntimeError:  # no home folder is known
        return text
    return text if home in ("/", "") else text.replace(f"{home}/", "~/")


def _block(block: Block) -> Block:
    if isinstance(block, Table):
        return replace(block, rows=[[_cell(cell) for cell in row] for row in block.rows])
    if isinstance(block, List):
        return replace(block, texts=[_text(text) for text in block.texts])
    if isinstance(block, Paragraph | Code):
        return replace(block, text=_text(block.text))
    return block if not isinstance(block, Figure) else replace(block, lines=[_text(line) for line in block.lines])


def _cell(cell: Cell) -> Cell:
    return _text(cell) if isinstance(cell, str) else cell
