"""`merganser verify`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..wording import plural, size_text
from ._options import Json
from .printing.progress import byte_progress
from .printing.text import complain, say, say_json

if TYPE_CHECKING:
    from ..record.verification import Verification


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that a merge wrote.", show_default=False)],
    json: Json = False,
) -> None:
    """Check an output against the hashes in its merge.json.

    Files that were added since are named, too.
    """
    from dataclasses import asdict

    from ..record.verification import verify as check

    with byte_progress("verify") as progress:
        found = check(out, progress=progress)
    if json:
        say_json({"ok": found.ok, **asdict(found)})
    else:
        _show(found)
    if not found.ok:
        counts = Counter(file.state for file in found.files) + Counter(new=len(found.extra))
        problems = [f"{counts[state]} {word}" for state, word in _WORDS.items() if counts[state]]
        complain(
            "error", f"{out}: not as written: {', '.join(problems)}; merge again, or remove what does not belong there"
        )
        raise typer.Exit(2)


_WORDS = {"changed": "changed", "missing": "missing", "link": "replaced by links", "new": "new"}


def _show(found: Verification) -> None:
    if found.ok:
        size = size_text(sum(file.bytes for file in found.files))
        say(f"{found.out}: {plural(len(found.files), 'file')}, {size}, all as they were written")
    for file in found.files:
        if file.problem is not None:
            say(f"{file.file}: {file.problem}")
    for name in found.extra:
        say(f"{name}: is new: it was not written by this merge, and loading may read it")
    for name in found.beside:
        say(f"{name}: is new: it was not written by this merge; what loads a model does not read it")
