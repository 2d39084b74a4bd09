"""`merganser verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..wording import plural, size_text
from ._options import Json
from ._progress import byte_progress
from ._text import complain, say, say_json


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that a merge wrote.", show_default=False)],
    json: Json = False,
) -> None:
    """Check an output against the hashes in its merge.json."""
    from dataclasses import asdict

    from ..record.verification import verify as check

    with byte_progress("verify") as progress:
        found = check(out, progress=progress)
    wrong = [file for file in found.files if file.problem]
    if json:
        say_json({"ok": found.ok, **asdict(found)})
    elif found.ok:
        size = size_text(sum(file.bytes for file in found.files))
        say(f"{out}: {plural(len(found.files), 'file')}, {size}, all as they were written")
    else:
        for file in wrong:
            say(f"{file.file}: {file.problem}")
        for name in found.extra:
            say(f"{name}: holds weights, and was not written by this merge")
    if not found.ok:
        problems = []
        if wrong:
            problems.append(f"{len(wrong)} of {plural(len(found.files), 'file')} not as written")
        if found.extra:
            problems.append(f"{plural(len(found.extra), 'file')} of weights too many")
        complain("error", f"{out}: {', '.join(problems)}; merge again, or remove what does not belong there")
        raise typer.Exit(2)
