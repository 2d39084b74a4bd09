"""`merganser calibrate`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from . import _options as options
from .printing.calibrations import calibration_rows
from .printing.progress import step_progress
from .printing.text import complain, head, plural, say, say_json, size_text, some, table, time_text

_BESIDE_ADD = ("add", "out", "quiet", "json")

if TYPE_CHECKING:
    from pathlib import Path

    from ..statistics import CalibrationPlan, Dataset, Statistics


def calibrate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A folder, a file of weights, or a Hub id.", show_default=False),
    ] = None,
    data: options.DataFiles = None,
    out: options.NewFolder = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER...",
            help="Add statistics of one model on several parts of its data, which were written before, in place of "
            "measuring them.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A data set on the Hub, or a folder, in place of files; needs the library datasets.",
            show_default=False,
        ),
    ] = None,
    subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Configuration of the data set.", show_default=False)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split of the data set.  [default: train]", show_default=False),
    ] = None,
    statistics: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="What to sum: gram, second_moment, magnitude, count; of gradients: fisher, gradient, absolute_gradient, "
            "sensitivity, gradient_gram; loss.",
        ),
    ] = "gram",
    sequences: options.Sequences = None,
    length: options.SequenceLength = None,
    seed: options.DrawSeed = 0,
    tokens: Annotated[str, typer.Option(metavar="all|completions", help="Which tokens count.")] = "all",
    labels: Annotated[
        str,
        typer.Option(
            metavar="data|sampled",
            help="Labels of the loss, for statistics of gradients: the text's tokens, or tokens drawn from the model (true "
            "Fisher information).",
        ),
    ] = "data",
    batch_tokens: options.BatchTokens = 2048,
    cache_dir: options.CacheDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show time, memory and disk that it would take; write nothing.")
    ] = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Write statistics of a model on text, for merges that use data."""
    if add:
        _check_alone(context)
        _add(add, _given(out), quiet=quiet, json=json)
        return
    if model is None:
        raise DataError("MODEL is missing: give a folder or a Hub id, or --add with folders of statistics")
    options.quieten_hub(quiet)
    from ..calibration import calibrate as run
    from ..calibration import plan_calibration

    given: dict[str, Any] = {
        "statistics": [name.strip() for name in statistics.split(",") if name.strip()],
        "sequences": sequences,
        "length": length,
        "seed": seed,
        "tokens": tokens,
        "labels": labels,
        "batch_tokens": batch_tokens,
        "cache_dir": cache_dir,
    }
    chosen = _data(data, dataset, subset, split)
    if dry_run:
        _show(plan_calibration(model, chosen, **given), json=json)
        return
    target = _given(out, ", or --dry-run")
    started = time.monotonic()
    with step_progress("calibrate", quiet) as progress:
        found = run(model, chosen, target, progress=progress, **given)
    if json:
        say_json(found.about)
    elif not quiet:
        _summary(found, time.monotonic() - started)


def _check_alone(context: typer.Context) -> None:
    """Refuse what is for measuring beside --add.

    Raises:
        DataError: It is there.
    """
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name not in _BESIDE_ADD and source is not None and source.name == "COMMANDLINE":
            shown = "MODEL" if name == "model" else parameter.opts[0]
            raise DataError(f"{shown} is for measuring, and --add only adds what was measured; leave one of them out")


def _given(out: Path | None, otherwise: str = "") -> Path:
    if out is None:
        raise DataError(f"--out is missing: give the folder to write{otherwise}")
    return out


def _add(folders: list[str], out: Path, *, quiet: bool, json: bool) -> None:
    from ..calibration import add_statistics

    started = time.monotonic()
    found = add_statistics(folders, out)
    if json:
        say_json(found.about)
    elif not quiet:
        _summary(found, time.monotonic() - started)


def _summary(found: Statistics, seconds: float) -> None:
    from ..process import peak_memory

    sequences, counted = (sum(part[key] for part in found.about["parts"]) for key in ("sequences", "counted"))
    head(
        f"{', '.join(found.statistics)} · {plural(len({*found.tensors, *found.gradients}), 'tensor')} · "
        f"{plural(sequences, 'sequence')} · {plural(counted, 'token')} · "
        f"{time_text(seconds)} · peak {size_text(peak_memory())}"
    )
    for key, kind in (("without", "statistics of inputs"), ("without_gradients", "gradients")):
        without = found.about.get(key, [])
        if without and (key != "without" or found.of_inputs):
            complain("note", f"{plural(len(without), 'tensor')} of the blocks have no {kind}: {some(without)}")
    if found.loss is not None:
        say(f"loss {found.loss:.4f} nats per token, over {plural(found.predictions, 'token')}")
    say(f"wrote {found.path} ({size_text(found.nbytes)})")


def _data(files: list[str] | None, dataset: str | None, subset: str | None, split: str | None) -> list[str] | Dataset:
    """Return what to calibrate on: files, or a data set."""
    from ..statistics import Dataset

    if dataset is None:
        if subset is not None or split is not None:
            raise DataError("--subset and --split are for --dataset, which is missing")
        return files or []
    if files:
        raise DataError("give --data or --dataset, not both")
    return Dataset(dataset, subset, split or "train")


def _show(plan: CalibrationPlan, *, json: bool) -> None:
    if json:
        say_json(asdict(plan))
        return
    head(f"calibrating {plan.model}")
    for line in table(calibration_rows([plan])):
        say(line)
