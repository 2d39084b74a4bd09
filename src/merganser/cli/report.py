"""`merganser report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..wording import size_text
from . import _options as options
from ._progress import byte_progress
from ._text import head, say, say_json, table

if TYPE_CHECKING:
    from ..report import Report
    from ..report.blocks import Block, Cell


def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that a merge wrote.", show_default=False)],
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", metavar="FILE", help="What merganser eval --json wrote.", show_default=False),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page.  [default: OUT/report.html]", show_default=False),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print it here; write no page.")] = False,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Measure singular values of task vectors, too; reads weights.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a page that exists.")] = False,
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Draw a merge: what went in, how far it moved, what it can do.

    The page is one HTML file that opens without a network.
    """
    options.quieten_hub()
    from ..report import read_report, write_report

    with byte_progress("spectra") as progress:
        if text:
            found = read_report(out, evaluation=evaluation, spectra=spectra, cache_dir=cache_dir, progress=progress)
        else:
            target = write_report(
                out,
                page,
                evaluation=evaluation,
                spectra=spectra,
                overwrite=overwrite,
                cache_dir=cache_dir,
                progress=progress,
            )
    if text:
        _print(found)
    elif json:
        say_json({"page": str(target), "bytes": target.stat().st_size})
    else:
        say(f"wrote {target} ({size_text(target.stat().st_size)}); open it in a browser")


def _print(report: Report) -> None:
    head(report.title)
    say(report.lead)
    for section in report.sections:
        say()
        head(section.title)
        for block in section.blocks:
            _block(block)


def _block(block: Block) -> None:
    from ..report.blocks import Code, Figure, List, Table

    if isinstance(block, Table):
        if block.folded:
            return
        if block.caption:
            say(block.caption)
        rows = [[_cell(cell) for cell in row] for row in block.rows]
        right = [i for i in range(len(block.head)) if block.numeric(i)]
        for line in table([list(block.head), *rows] if any(block.head) else rows, right=right):
            say(line)
    elif isinstance(block, Figure):
        say(block.title)
        for line in block.lines:
            say(line)
    elif isinstance(block, List):
        say(block.kind)
        for text in block.texts:
            say(f"  {text}")
    elif isinstance(block, Code):
        for line in block.text.rstrip().splitlines():
            say(f"  {line}")
    else:
        say(block.text)


def _cell(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell.text
