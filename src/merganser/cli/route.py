"""`merganser route`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ParameterError
from ..wording import plural, time_text
from . import _options as options
from ._text import head, say, say_json, table


def route(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="Folder that a merge with sidecars wrote, a folder of adapters, or BASE+FOLDER.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="TASK=FILE...",
            help="Text of every task (.txt, .jsonl, .parquet); a task may have several files.",
            show_default=False,
        ),
    ],
    length: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Tokens of a window of text.  [default: 256]", show_default=False),
    ] = None,
    windows: Annotated[int, typer.Option(min=2, metavar="N", help="Most windows of a task.")] = 200,
    device: options.Device = "cpu",
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Make the router that chooses a task or an adapter per text."""
    options.quieten_hub(quiet)
    if "+" not in out:
        options.check_output(Path(out))
    files: dict[str, list[str]] = {}
    for each in data:
        name, sign, file = each.partition("=")
        if not (sign and name and file):
            raise ParameterError(f"--data: must be TASK=FILE, got {each!r}")
        files.setdefault(name, []).append(file)
    from ..engine.kernels.devices import resolve_devices
    from ..runtime.routed.making import make_router

    started = time.monotonic()
    found = make_router(out, files, length=length, windows=windows, device=resolve_devices(device)[0])
    if json:
        say_json(
            {
                "file": str(found.file),
                "length": found.length,
                "tasks": {
                    task: {"fitted": found.fitted[task], "right": found.right(task), "chosen": chosen}
                    for task, chosen in found.chosen.items()
                },
            }
        )
        return
    if quiet:
        return
    head(f"router of {plural(len(found.chosen), 'task')} · {time_text(time.monotonic() - started)}")
    say(f"choices for held-out windows of {found.length} tokens")
    rows = [["text of", "made from", "held out", "right", *(f"-> {task}" for task in found.chosen)]]
    for task, chosen in found.chosen.items():
        counts = [str(chosen.get(other, 0)) for other in found.chosen]
        rows.append(
            [task, str(found.fitted[task]), str(sum(chosen.values())), f"{100 * found.right(task):.1f} %", *counts]
        )
    for line in table(rows):
        say(line)
    say(f"wrote {found.file}")
