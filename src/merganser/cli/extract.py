"""`merganser extract`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..wording import number_text, plural, size_text, some, time_text
from . import _options as options
from .printing.progress import byte_progress
from .printing.text import complain, head, say, say_json, table

if TYPE_CHECKING:
    from collections.abc import Mapping

_CHOICES = {"embeddings": ("save", "low-rank", "drop"), "others": ("save", "drop")}
_DTYPES = ("float32", "bfloat16", "float16")


def extract(
    finetune: Annotated[
        str,
        typer.Argument(
            metavar="FINETUNE", help="The fine-tuned model: a folder, a file or a Hub id.", show_default=False
        ),
    ],
    base: Annotated[str, typer.Option(metavar="CKPT", help="Its base.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="The folder to write; it appears when it is complete.", show_default=False
        ),
    ],
    rank: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rank of every factored matrix.", show_default=False)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Instead of a rank: the share of every change's squared norm to keep, such as 0.95.",
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        str,
        typer.Option(
            metavar="save|low-rank|drop",
            help="Changed embeddings and heads: stored whole, factored, or left as in the base.",
        ),
    ] = "save",
    others: Annotated[
        str, typer.Option(metavar="save|drop", help="Other changed tensors, such as norms: stored whole, or left.")
    ] = "save",
    dtype: Annotated[str, typer.Option(metavar="|".join(_DTYPES), help="Dtype of the factors.")] = "float32",
    overwrite: options.Overwrite = False,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Write what a fine-tune changed as an adapter.

    Weight matrices are approximated by factors of low rank (LoRA); other tensors are stored whole, or left.
    """
    options.quieten_hub(quiet)
    _check(rank, energy, {"embeddings": embeddings, "others": others}, dtype)
    from ..engine.adapters.extract import extract as take_out

    started = time.monotonic()
    chosen: Any = {"embeddings": embeddings, "others": others}
    with byte_progress("extract", quiet) as progress:
        found = take_out(
            finetune,
            base,
            out,
            rank=rank,
            energy=energy,
            dtype=dtype,
            overwrite=overwrite,
            cache_dir=cache_dir,
            progress=progress,
            **chosen,
        )
    if json:
        say_json({"out": str(found.out), "record": found.record})
    elif not quiet:
        _summary(found.out, found.record, time.monotonic() - started)


def _check(rank: int | None, energy: float | None, chosen: Mapping[str, str], dtype: str) -> None:
    """End with a message if the options are not valid."""
    problem = None
    if (rank is None) == (energy is None):
        problem = "give --rank N or --energy X" + ("" if rank is None else ", not both")
    elif energy is not None and not 0 < energy <= 1:
        problem = f"--energy: must be above 0 and at most 1, got {energy:g}"
    elif dtype not in _DTYPES:
        problem = f"--dtype: must be one of {', '.join(_DTYPES)}, got {dtype!r}"
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            problem = f"--{name}: must be one of {', '.join(_CHOICES[name])}, got {value!r}"
    if problem:
        complain("error", f"extract: {problem}")
        raise typer.Exit(2)


def _summary(out: Path, record: Mapping[str, Any], seconds: float) -> None:
    extracted = record["extracted"]
    ranks = extracted["ranks"]
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    head(f"{plural(extracted['factored'], 'weight')} in factors of {span} · {time_text(seconds)}")
    say(f"leaves {number_text(extracted['error'])} of the whole change as error; the largest shares of its own change:")
    worst = sorted(record["changes"], key=lambda entry: -entry["relative_error"])[:3]
    for line in table([[entry["tensor"], number_text(entry["relative_error"]), entry["kept"]] for entry in worst]):
        say(line)
    if extracted["saved"]:
        say(f"stored whole: {some(extracted['saved'])}")
        say("vLLM loads adapters of factors alone: for it, --others drop, and --embeddings low-rank or drop")
    if extracted["dropped"]:
        say(f"left as in the base: {some(extracted['dropped'])}")
    size = sum(entry["bytes"] for entry in record["outputs"] if entry["file"].endswith(".safetensors"))
    say(f"wrote {out} ({size_text(size)}) and {out / 'merge.json'}")
    say(f'load it:   peft.PeftModel.from_pretrained(base, "{out}")')
    say(f"merge it:  in a recipe, model: {extracted['base']}+{out}")
