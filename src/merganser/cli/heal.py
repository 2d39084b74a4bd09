"""`merganser heal`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DataError
from ..wording import plural, some
from . import _options as options
from .printing.progress import merge_progress, step_progress
from .printing.text import complain, head, say, say_json, table

if TYPE_CHECKING:
    from ..calibration.seams import Healing


def heal(
    stacked: Annotated[
        Path, typer.Argument(metavar="OUT", help="A model that merganser stacked from slices.", show_default=False)
    ],
    healed: Annotated[Path, typer.Argument(metavar="HEALED", help="The folder to write.", show_default=False)],
    data: options.DataFiles = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Blocks after each seam to fit, in addition to the one before it.  [default: all up to the next seam]",
            show_default=False,
        ),
    ] = None,
    sequences: options.Sequences = None,
    length: options.SequenceLength = None,
    seed: options.DrawSeed = 0,
    overwrite: options.Overwrite = False,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Fit layers of a stacked model to the models they came from.

    Matrices are fitted on text; one in four sequences is held out, and nothing is written unless the model predicts these
    better than before.
    """
    options.quieten_hub(quiet)
    if not data:
        raise DataError("--data is missing: name files of text, on which the models are compared")
    options.check_output(stacked)
    from ..calibration.seams import heal as run

    with step_progress("heal", quiet) as progress, merge_progress(quiet) as writing:
        found = run(
            stacked,
            data,
            healed,
            blocks=blocks,
            sequences=sequences,
            length=length,
            seed=seed,
            overwrite=overwrite,
            cache_dir=cache_dir,
            progress=progress,
            writing=writing,
        )
    if json:
        plain = {name: value for name, value in asdict(found).items() if name != "result"}
        say_json({**plain, "out": None if found.out is None else str(found.out)})
    elif not quiet:
        _show(found, stacked)


def _show(found: Healing, stacked: Path) -> None:
    if not found.seams:
        say(f"{stacked} has no seams, so there is nothing to heal; nothing was written")
        return
    head(f"{plural(len(found.seams), 'seam')} · {plural(len(found.tensors), 'tensor')} fitted")
    if found.tensors:
        rows = [["tensor", "error before", "after", "ridge"]]
        rows += [
            [own["name"], f"{own['before'] ** 0.5:.1%}", f"{own['after'] ** 0.5:.1%}", f"{own['ridge']:g}"]
            for own in found.tensors
        ]
        for line in table(rows, right=(1, 2, 3)):
            say(line)
    for reason in dict.fromkeys(found.skipped.values()):
        names = [name for name, own in found.skipped.items() if own == reason]
        complain("note", f"not fitted: {some(names)}: {reason}")
    if found.healed is not None:
        say(f"perplexity on held-out text: {found.perplexity:.2f} before, {found.healed:.2f} after")
    if found.out is None:
        why = (
            "the model would not predict held-out text better than before" if found.tensors else "no tensor was fitted"
        )
        say(f"nothing was written: {why}")
        return
    say(f"wrote {found.out} and {found.out / 'merge.json'}")
