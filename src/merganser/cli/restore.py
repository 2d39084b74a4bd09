"""`merganser restore`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..wording import count_text, number_text, plural, size_text, time_text
from . import _options as options
from .printing.progress import byte_progress
from .printing.text import complain, head, say, say_json


def restore(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder that a merge with sidecars wrote.", show_default=False)
    ],
    task: Annotated[str, typer.Option(metavar="NAME", help="The task to restore.", show_default=False)],
    target: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The folder to write.  [default: OUT-NAME]", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT", help="The base of the merge.  [default: its path in the merge]", show_default=False
        ),
    ] = None,
    out_shard_size: options.ShardSize = options.SHARD_SIZE,  # type: ignore[assignment]  # parsed like what is given
    overwrite: options.Overwrite = False,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Rebuild a task's own checkpoint from a merge with sidecars."""
    options.quieten_hub(quiet)
    options.check_output(out)
    from ..engine.sidecars.restoration import restore as bring_back

    started = time.monotonic()
    with byte_progress("restore", quiet) as progress:
        found = bring_back(
            out,
            task,
            target,
            base=base,
            overwrite=overwrite,
            out_shard_size=out_shard_size,
            cache_dir=cache_dir,
            progress=progress,
        )
    record = found.record
    for warning in found.warnings:
        complain("warning", warning)
    if json:
        say_json({"out": str(found.out), "record": record})
        return
    if quiet:
        return
    head(
        f"{task} of {out} · {plural(record['tensors'], 'tensor')} · {count_text(record['parameters'])} parameters · "
        f"{time_text(time.monotonic() - started)}"
    )
    files = [entry for entry in record["outputs"] if entry["file"].endswith(".safetensors")]
    say(f"wrote {found.out} ({plural(len(files), 'file')}, {size_text(sum(entry['bytes'] for entry in files))})")
    described = record["restored"]["task"]
    if "error" in described:
        say(
            f"off by {number_text(described['error'])} of the model's norm, "
            f"{number_text(described.get('error_of_task_vector'))} of its task vector's"
        )
