"""`merganser inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..wording import count_text, plural, size_text, some
from . import _options as options
from .printing.kinship import kinship_json, print_kinship
from .printing.progress import byte_progress, step_progress
from .printing.seams import print_seams, seams_json
from .printing.text import complain, head, say, say_json, table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..inspection.contents import InspectedAdapter, Inspection, Share


def inspect(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT...",
            help="A folder, a file of weights, a Hub id (org/name@revision), MODEL+ADAPTER or an adapter; with --base "
            "several.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="Compare the task vectors of the checkpoints, of which this one is the base; reads all weights.",
            show_default=False,
        ),
    ] = None,
    cache_dir: options.CacheDir = None,
    stream: options.Stream = False,
    seams: Annotated[
        bool,
        typer.Option("--seams", help="Examine the seams of a model stacked from slices, on the text of --data."),
    ] = False,
    data: options.DataFiles = None,
    sequences: options.Sequences = None,
    length: options.SequenceLength = None,
    seed: options.DrawSeed = 0,
    tensors: options.AllTensors = False,
    json: options.Json = False,
) -> None:
    """Describe a checkpoint, or how models of one base are related.

    Or, with --seams: how much the inputs of layers of a stacked model differ from those in their own models.
    """
    options.quieten_hub()
    drawn = options.chosen(sequences=sequences, length=length, seed=seed or None)
    if seams:
        refused = "--base" if base is not None else "--tensors" if tensors else "--stream" if stream else None
        if refused:
            complain("error", f"inspect: {refused} is for inspecting without --seams; leave one of the two out")
            raise typer.Exit(2)
        _seams(checkpoints, data, cache_dir, drawn, json=json)
        return
    if data or drawn:
        complain("error", "inspect: --data, --sequences, --length and --seed are for --seams, which is missing")
        raise typer.Exit(2)
    if base is not None:
        _compare(checkpoints, base, cache_dir, stream=stream, tensors=tensors, json=json)
        return
    if len(checkpoints) > 1:
        complain(
            "error",
            f"inspect: describes one checkpoint, got {len(checkpoints)}; compare several with --base BASE, two with diff",
        )
        raise typer.Exit(2)
    _describe(checkpoints[0], cache_dir, stream=stream, tensors=tensors, json=json)


def _compare(models: list[str], base: str, cache_dir: Path | None, *, stream: bool, tensors: bool, json: bool) -> None:
    from ..inspection.task_vectors import kinship

    with byte_progress("inspect") as progress:
        found = kinship(models, base, cache_dir=cache_dir, stream=stream, progress=progress)
    if json:
        say_json(kinship_json(found, every=tensors))
    else:
        print_kinship(found, every=tensors)


def _seams(
    checkpoints: list[str], data: list[str] | None, cache_dir: Path | None, drawn: dict[str, int], *, json: bool
) -> None:
    if len(checkpoints) > 1:
        complain("error", f"inspect: --seams looks at one stacked model, got {len(checkpoints)}")
        raise typer.Exit(2)
    if not data:
        complain("error", "inspect: --seams needs text: name files with --data")
        raise typer.Exit(2)
    options.check_output(Path(checkpoints[0]))
    from ..calibration.seams import inspect_seams

    with step_progress("seams") as progress:
        found = inspect_seams(checkpoints[0], data, cache_dir=cache_dir, progress=progress, **drawn)
    if json:
        say_json(seams_json(found))
    else:
        print_seams(found)


def _describe(checkpoint: str, cache_dir: Path | None, *, stream: bool, tensors: bool, json: bool) -> None:
    from ..adapters import is_adapter
    from ..inspection.contents import inspect as look
    from ..inspection.contents import inspect_adapter

    if is_adapter(checkpoint):
        adapter = inspect_adapter(checkpoint, cache_dir=cache_dir)
        if json:
            say_json(asdict(adapter))
            return
        size = f"{plural(adapter.parameters, 'parameter')}, {size_text(adapter.bytes)}"
        head(f"{adapter.kind} adapter · {size}")
        for line in table(_adapter(adapter)):
            say(line)
        return
    found = look(checkpoint, cache_dir=cache_dir, stream=stream)
    if json:
        described = asdict(found)
        if not tensors:
            described["tensors"] = len(found.tensors)
        say_json(described)
        return
    _print(found)
    if tensors:
        say("tensors")
        for line in table([[t.name, str(list(t.shape)), t.dtype, t.role, t.file] for t in found.tensors]):
            say(line)
    if found.warnings:
        say("warnings")
    for warning in found.warnings:
        say(f"  {warning}")


def _adapter(found: InspectedAdapter) -> list[list[str]]:
    """Return rows that describe an adapter."""
    rows = [["folder", str(found.path)], ["base", found.base or "not named"]]
    if found.low_rank:
        rows.append(["ranks", some([str(rank) for rank in found.ranks], 6)])
    changed = ", ".join(f"{name} {count}" for name, count in found.modules.items())
    if changed:
        rows.append(["changes", f"{plural(found.low_rank + found.scaled, 'weight')}: {changed}"])
    if found.replaced:
        rows.append(["replaces", some(found.replaced)])
    rows.append(["dtypes", ", ".join(found.dtypes)])
    return rows


def _print(found: Inspection) -> None:
    size = (
        f"{plural(len(found.tensors), 'tensor')}, {count_text(found.parameters)} parameters, {size_text(found.bytes)}"
    )
    head(f"{found.architecture or 'unknown architecture'} · {size}")
    rows = [["folder", str(found.path)]]
    if found.layers:
        rows.append(["layers", f"{found.layers} ({next(iter(found.stacks))})"])
    others = list(found.stacks.items())[1 if found.layers else 0 :]
    if others:
        rows.append(["other stacks", ", ".join(f"{prefix}: {count}" for prefix, count in others)])
    if found.vocabulary is not None:
        rows.append(["vocabulary", f"{found.vocabulary:,}"])
    rows.append(["tied", ", ".join(f"{alias} = {source}" for alias, source in found.tied) or "nothing"])
    rows.append(["quantised", found.quantised or "no"])
    if found.side_files:
        rows.append(["other files", some(found.side_files, 6)])
    for line in table(rows):
        say(line)
    if found.adapter:
        say("adapter")
        for line in table([["kind", found.adapter.kind], *_adapter(found.adapter)]):
            say(line)
    for title, shares in (("dtypes", found.dtypes), ("roles", found.roles)):
        say(title)
        for line in table(_shares(shares), right=(1, 2)):
            say(line)
    say("files")
    rows = [[file.file, plural(file.tensors, "tensor"), size_text(file.bytes)] for file in found.files]
    for line in table(rows, right=(1, 2)):
        say(line)


def _shares(shares: Mapping[str, Share]) -> list[list[str]]:
    return [
        [kind, plural(share.tensors, "tensor"), f"{count_text(share.parameters)} parameters"]
        for kind, share in shares.items()
    ]
