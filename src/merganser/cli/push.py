"""`merganser push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..wording import plural, size_text
from . import _options as options
from .printing.progress import byte_progress
from .printing.text import complain, head, say, say_json, table

if TYPE_CHECKING:
    from ..publishing import Push


def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that merganser wrote.", show_default=False)],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="A model repository of the Hub, as in owner/name.", show_default=False)
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Upload; without it, only show what would be uploaded.")] = False,
    public: Annotated[bool, typer.Option("--public", help="If the repository is created, make it public.")] = False,
    license: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="The licence of the output, such as apache-2.0.  [default: that of the inputs, if all have the same]",
            show_default=False,
        ),
    ] = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Upload an output to the Hub, or show what would be uploaded.

    The card gets the base models and the licences of all inputs.
    """
    options.quieten_hub(quiet)
    from ..publishing import plan_push
    from ..publishing import push as upload

    with byte_progress("verify") as progress:
        planned = plan_push(out, repo, licence=license, progress=progress)
    if not quiet and not json:
        _show(planned, yes=yes, public=public)
    address = upload(planned, private=not public) if yes else None
    if json:
        told = asdict(planned) | {"out": str(planned.out), "changed": sorted(planned.changed)}
        say_json({**told, "private": not public, "uploaded": address})
    elif not quiet:
        say(f"uploaded: {address}" if yes else "nothing was uploaded; add --yes to do it")


def _show(planned: Push, *, yes: bool, public: bool) -> None:
    size = size_text(sum(file.bytes for file in planned.files))
    kind = "public" if public else "private"
    head(f"{planned.out} → {planned.repo} · {plural(len(planned.files), 'file')}, {size} · {kind} if it is created")
    for line in table([[file.name, size_text(file.bytes)] for file in planned.files], right=(1,)):
        say(line)
    if planned.left:
        say(f"not written by the merge, and not uploaded: {', '.join(planned.left)}")
    say("licences of the inputs")
    rows = [[each.model, each.licence or "not known", each.source] for each in planned.licences]
    for line in table([["model", "licence", "found in"], *rows]):
        say(line)
    for warning in planned.warnings:
        complain("warning", warning)
    if not yes:
        say(f"the card, {planned.files[0].name}")
        for line in planned.card.splitlines():
            say(f"  {line}")
