"""`merganser report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..wording import size_text
from . import _options as options
from .printing.progress import byte_progress
from .printing.report import print_report
from .printing.text import say, say_json


def report(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder that a merge or a search wrote.", show_default=False)
    ],
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
    """Draw a page about a merge or a search.

    The page is one HTML file that opens without a network.
    """
    options.quieten_hub()
    options.check_output(out)
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
        print_report(found)
    elif json:
        say_json({"page": str(target), "bytes": target.stat().st_size})
    else:
        say(f"wrote {target} ({size_text(target.stat().st_size)}); open it in a browser")
