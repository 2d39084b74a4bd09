"""`merganser export`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..wording import number_text, plural, size_text, some, time_text
from . import _options as options
from .printing.text import complain, head, say, say_json, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..engine.adapters.export import Exported


def export(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder that a merge with sidecars wrote.", show_default=False)
    ],
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Where the adapters are written, as FOLDER/TASK.", show_default=False),
    ],
    to: Annotated[str, typer.Option(metavar="peft", help="The format: LoRA adapters of peft.")] = "peft",
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A task; may be repeated.  [default: all]", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT", help="The base of the merge.  [default: its path in the merge]", show_default=False
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Write the sidecars of a merge as LoRA adapters."""
    options.quieten_hub(quiet)
    options.check_output(out)
    if to != "peft":
        complain("error", f"export: --to: must be peft, got {to!r}")
        raise typer.Exit(2)
    from ..engine.adapters.export import export_adapters

    started = time.monotonic()
    found = export_adapters(out, folder, tasks=task or (), base=base, overwrite=overwrite, cache_dir=cache_dir)
    if json:
        say_json([{"task": each.task, "out": str(each.out), "record": each.record} for each in found])
    elif not quiet:
        _summary(found, out, time.monotonic() - started)


def _summary(found: Sequence[Exported], out: Path, seconds: float) -> None:
    head(f"{plural(len(found), 'adapter')} of {out} · {time_text(seconds)}")
    rows = [["task", "weights in factors", "most rank", "stored whole", "error", "size"]]
    for each in found:
        made = each.record["exported"]
        size = sum(entry["bytes"] for entry in each.record["outputs"] if entry["file"].endswith(".safetensors"))
        rows.append(
            [
                each.task,
                str(made["factored"]),
                str(max(made["ranks"])),
                plural(len(made["saved"]), "tensor"),
                number_text(made["error"]),
                size_text(size),
            ]
        )
    for line in table(rows):
        say(line)
    say("error: what the adapter leaves, relative to what restoring the task changes; of each tensor in merge.json")
    made = found[0].record["exported"]
    if made["saved"]:
        say(f"stored whole (modules_to_save): {some(made['saved'])}")
        # on the base, the shared norms of the merged model differ, too
        also = "" if made["base"] == str(out) else " and origin: merged"
        say(f"vLLM loads adapters of factors alone: for it, merge with others: merged{also}")
    if made["tied_in_factors"]:
        complain(
            "note",
            f"{some(made['tied_in_factors'])}: tied to the embeddings, and peft has factors for both: load the adapter, "
            "but do not merge it into the weights (merge_and_unload), which adds both to the one tensor",
        )
    say(f"wrote {', '.join(str(each.out) for each in found)}")
    say(f'load one:  peft.PeftModel.from_pretrained(model, "{found[0].out}"), where model is {made["base"]}')
