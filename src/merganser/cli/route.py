"""`merganser route`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ParameterError, did_you_mean
from ..wording import plural
from . import _options as options
from .printing.routed import print_gates, print_mixture, print_router


def route(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="Folder that a merge with sidecars wrote, a folder of adapters, or BASE+FOLDER of adapters or fine-tunes; for "
            "mergeme a folder of models.",
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
    windows: Annotated[int, typer.Option(min=2, metavar="N", help="Windows of text per task, at most.")] = 200,
    gates: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Make gates, which weight parts of all tasks (wemoe, e-wemoe, mole, self-moe, smile) or their "
            "attention and MLPs (bam, bam-kv); or mix models of unequal sizes (mergeme).",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --gates: reduce parts to this rank.", show_default=False),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="With --gates: keep this share of elements, the largest.", show_default=False
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --gates mergeme: weights by a router or by perplexity.  [default: router]",
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --gates mergeme: experts keep their own embeddings, or have shared ones.  [default: own]",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="With --gates mergeme: experts per text.  [default: 1]", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, metavar="N", help="With --gates: training steps.")] = 0,
    objective: Annotated[str, typer.Option(metavar="NAME", help="With --gates: train on loss or entropy.")] = "loss",
    device: options.Device = "cpu",
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Fit a router that chooses a task per text, or gates of tasks."""
    options.quieten_hub(quiet)
    if "+" not in out:
        options.check_output(Path(out))
    files = _files(data)
    from ..engine.kernels.devices import resolve_devices
    from ..runtime.routed.making import make_router
    from ..runtime.routed.unequal.settings import KIND as MERGEME

    started = time.monotonic()
    chosen_device = resolve_devices(device)[0]
    if gates == MERGEME:
        _refuse({"rank": rank, "density": density}, f"is for parts of one model, and {MERGEME} mixes whole models")
        from ..runtime.routed.gated.fitting import Training
        from ..runtime.routed.unequal.making import make_mixture
        from ..runtime.routed.unequal.settings import MixtureSettings

        mixing = MixtureSettings(by or "router", embeddings or "own", top or 1)
        training = Training(steps, objective=objective)
        mixture = make_mixture(
            out, files, mixing, length=length, windows=windows, training=training, device=chosen_device
        )
        print_mixture(mixture, time.monotonic() - started, quiet=quiet, json=json)
        return
    _refuse({"by": by, "embeddings": embeddings, "top": top}, f"is for --gates {MERGEME}")
    if gates is not None:
        from ..runtime.routed.gated.fitting import Training
        from ..runtime.routed.gated.making import make_gates
        from ..runtime.routed.gated.settings import KINDS, settings_of

        if gates not in KINDS:
            kinds = [*KINDS, MERGEME]
            raise ParameterError(f"gates: no kind {gates!r}.{did_you_mean(gates, kinds)} Kinds: {', '.join(kinds)}")
        settings = settings_of(gates, rank=rank, density=density)
        training = Training(steps, objective=objective)
        report = make_gates(
            out, files, settings, length=length, windows=windows, training=training, device=chosen_device
        )
        if settings.mix == "parts":
            what = f"parts in {plural(report.layers, 'linear layer')}"
        else:
            what = f"experts in place of {plural(report.layers, 'module')}"
        print_gates(report, gates, what, time.monotonic() - started, quiet=quiet, json=json)
        return
    _refuse({"rank": rank, "density": density, "steps": steps or None}, "is for gates; name a kind with --gates")
    found = make_router(out, files, length=length, windows=windows, device=chosen_device)
    print_router(found, time.monotonic() - started, quiet=quiet, json=json)


def _files(data: list[str]) -> dict[str, list[str]]:
    """Return the files of every task."""
    files: dict[str, list[str]] = {}
    for each in data:
        name, sign, file = each.partition("=")
        if not (sign and name and file):
            raise ParameterError(f"--data: must be TASK=FILE, got {each!r}")
        files.setdefault(name, []).append(file)
    return files


def _refuse(options: Mapping[str, Any], reason: str) -> None:
    """Refuse options that were given and are for something else.

    Raises:
        ParameterError: One is not None.
    """
    for name, value in options.items():
        if value is not None:
            raise ParameterError(f"--{name}: {reason}")
