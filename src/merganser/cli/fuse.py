"""`merganser fuse`: what is needed to teach one model what others say."""

from __future__ import annotations

import math
import time
from typing import Annotated

import typer

from ..errors import DataError
from . import _options as options
from ._errors import Verbs
from ._progress import step_progress
from ._text import head, plural, say, say_json, size_text, time_text

fuse = typer.Typer(cls=Verbs, help="Store what models predict, to teach it to another one.", no_args_is_help=True)


@fuse.callback()
def _group() -> None:
    """Store what models predict, to teach it to another one."""


@fuse.command(cls=options.many_values("--data"))
def cache(
    model: options.Model,
    data: options.DataFiles = None,
    out: options.NewFolder = None,
    top: Annotated[int, typer.Option(min=1, metavar="K", help="Likeliest tokens stored per position.")] = 32,
    sequences: options.Sequences = None,
    length: options.SequenceLength = None,
    seed: options.DrawSeed = 0,
    tokens: Annotated[str, typer.Option(metavar="all|completions", help="Which tokens are marked to count.")] = "all",
    batch_tokens: options.BatchTokens = 512,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Write what a model predicts at every position of some texts."""
    options.quieten_hub(quiet)
    from ..distillation import cache_logits
    from ..process import peak_memory

    if out is None:
        raise DataError("--out is missing: give the folder to write")
    started = time.monotonic()
    with step_progress("cache", quiet) as progress:
        found = cache_logits(
            model,
            data or [],
            out,
            k=top,
            sequences=sequences,
            length=length,
            seed=seed,
            tokens=tokens,
            batch_tokens=batch_tokens,
            cache_dir=cache_dir,
            progress=progress,
        )
    if json:
        say_json(found.about)
        return
    if quiet:
        return
    count = int(found.total("tokens"))
    head(
        f"{plural(int(found.total('sequences')), 'sequence')} · {plural(count, 'token')} · top {found.k} of "
        f"{found.about['vocabulary']:,} · {time_text(time.monotonic() - started)} · peak {size_text(peak_memory())}"
    )
    nats, predicted, nbytes = found.total("nats"), found.total("predicted"), found.total("predicted_bytes")
    if predicted and nbytes:
        say(f"{nats / predicted:.3f} nats per token, {nats / math.log(2) / nbytes:.3f} bits per byte")
    say(f"the top {found.k} hold {100 * (1 - found.total('rest') / count):.2f}% of the probability")
    say(f"wrote {found.path} ({size_text(found.nbytes)})")
