"""`merganser transplant`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..wording import count_text, plural, size_text, time_text
from . import _options as options
from .printing.progress import merge_progress, step_progress
from .printing.text import complain, head, say, say_json
from .printing.vocabulary import vocabulary_lines

_NEW_TOKENS = 1000


def transplant(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="The model: a folder, a file of weights, or a Hub id.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="The folder to write.", show_default=False)],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DONOR",
            help="The model whose tokenizer the output gets; most methods read its weights.",
            show_default=False,
        ),
    ] = None,
    romanise: Annotated[
        str | None,
        typer.Option(
            metavar="max|min|average",
            help="Instead of --tokenizer: add the model's own tokens in Latin letters.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Instead of --tokenizer: add tokens for frequent pairs of the model's tokens in this text; may be repeated.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --text: number of tokens to add.  [default: 1000]", show_default=False),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            metavar="mean|last|first",
            help="With --text: make the row of a new token from the mean of its parts, or from one part.  [default: mean]",
            show_default=False,
        ),
    ] = None,
    train_steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="With --text: training steps of a small network that makes the rows; the model itself is not changed.",
        ),
    ] = 0,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How rows of new tokens are made: omp, interpolate, barycentric, focus, wechsel, subword, mean, zero.",
        ),
    ] = "omp",
    k: Annotated[
        int | None,
        typer.Option(
            "--k",
            metavar="N",
            help="Number of shared tokens that a new row is made from.  [default: omp, interpolate, barycentric 64; focus 1024; wechsel 10]",
            show_default=False,
        ),
    ] = None,
    threads: options.Threads = None,
    out_shard_size: options.ShardSize = options.SHARD_SIZE,  # type: ignore[assignment]  # parsed like what is given
    overwrite: options.Overwrite = False,
    fresh: options.Fresh = False,
    max_memory: options.MaxMemory = None,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Give a model the tokenizer of another one.

    Or add tokens: with --romanise its own tokens in Latin letters, with --text frequent pairs of its tokens.
    """
    options.quieten_hub(quiet)
    _check(tokenizer, romanise, text, method=method, k=k, new_tokens=new_tokens, parts=parts, steps=train_steps)
    from ..engine.output.staging import check_target
    from ..engine.run import run_plan
    from ..transplant import plan_merged_tokens, plan_romanised, plan_transplant

    started = time.monotonic()
    given = options.chosen(threads=threads, out_shard_size=out_shard_size, max_memory=max_memory, cache_dir=cache_dir)
    check_target(out, overwrite=overwrite)
    with step_progress("new tokens", quiet) as advance:
        if romanise is not None:
            method = f"romanised ({romanise})"
            plan = plan_romanised(model, romanise, advance=advance, **given)
        elif text:
            method = "merged pairs"
            count = _NEW_TOKENS if new_tokens is None else new_tokens
            given |= {"parts": parts or "mean", "train_steps": train_steps}
            plan = plan_merged_tokens(model, text, count, advance=advance, **given)
        else:
            assert tokenizer is not None
            plan = plan_transplant(model, tokenizer, method=method, k=k, advance=advance, **given)
    with merge_progress(quiet) as progress:
        result = run_plan(plan, out, overwrite=overwrite, fresh=fresh, progress=progress)
    if json:
        say_json({"out": str(result.out), "record": result.record})
    elif not quiet:
        _summary(result.out, result.record, method, time.monotonic() - started)


def _check(
    tokenizer: str | None,
    romanise: str | None,
    text: list[Path] | None,
    *,
    method: str,
    k: int | None,
    new_tokens: int | None,
    parts: str | None,
    steps: int,
) -> None:
    """Refuse options that do not go together."""
    wrong = None
    if sum((tokenizer is not None, romanise is not None, bool(text))) != 1:
        wrong = "give --tokenizer, --romanise or --text, one of them"
    elif tokenizer is None and (method != "omp" or k is not None):
        wrong = "--method and --k are for --tokenizer; leave them out"
    elif not text and (new_tokens is not None or parts is not None or steps):
        wrong = "--new-tokens, --parts and --train-steps are for --text; leave them out"
    if wrong is not None:
        complain("error", f"transplant: {wrong}")
        raise typer.Exit(2)


def _summary(out: Path, record: Mapping[str, Any], method: str, seconds: float) -> None:
    from ..process import peak_memory

    head(
        f"{method} · {plural(record['tensors'], 'tensor')} · {count_text(record['parameters'])} parameters · "
        f"{time_text(seconds)} · peak {size_text(peak_memory())}"
    )
    for line in vocabulary_lines(record["vocabulary"]):
        say(line)
    made = record["vocabulary"]["made_by"]
    if "held_out_bytes" in made:
        before, after, size = (made[f"held_out_{name}"] for name in ("tokens_before", "tokens_after", "bytes"))
        say(
            f"  {before / size:.3f} tokens per byte before, {after / size:.3f} now "
            f"({100 * after / before - 100:+.1f} %), on {size_text(size)} of the text that was held out"
        )
    if "train_steps" in made:
        before, after = made["loss_of_mean"], made["loss_of_trained"]
        kept = "" if after < before else "; the mean is kept"
        say(
            f"  loss per token on a part of that: {before:.3f} with the mean of the parts, {after:.3f} after "
            f"{plural(made['train_steps'], 'step')} of training{kept}"
        )
    say(f"wrote {out} and {out / 'merge.json'}; {out / record['vocabulary']['list']} lists every token")
    say(f"measure it: merganser eval {out}")
