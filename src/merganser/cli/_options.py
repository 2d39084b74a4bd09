"""Options that several verbs share, and functions that interpret them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import NotFoundError
from ._errors import Verb
from .printing.text import on_terminal, parse_size

RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="The recipe, a YAML file; - reads it from standard input.", show_default=False
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT", help="A folder, a file of weights, or a Hub id (org/name@revision).", show_default=False
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Number of threads.  [default: one per core, 8 at most]", show_default=False),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where to compute.")]
ShardSize = Annotated[
    int, typer.Option(parser=parse_size, metavar="SIZE", help="Largest size of an output file, such as 5GB or 900MiB.")
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Seed of random draws.  [default: the recipe's, else 0]", show_default=False),
]
MaxMemory = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        help="Memory that may be used.  [default: a quarter of the memory here, 1 to 4 GB]",
        show_default=False,
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder for models from the Hub.  [default: huggingface_hub's]", show_default=False
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Fetch weights of Hub models over the network when they are needed, without storing them on disk.",
    ),
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a file of weights, or a Hub id.", show_default=False)
]
DataFiles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE...",
        help="Text files (.txt), or records with text, prompt and completion, or messages (.jsonl, .parquet).",
        show_default=False,
    ),
]
NewFolder = Annotated[Path | None, typer.Option(metavar="FOLDER", help="The folder to write.", show_default=False)]
Sequences = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Sequences drawn from the data.  [default: 64, or all there are]", show_default=False
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="N",
        help="Tokens of a sequence, at most.  [default: 256, or the model's maximum]",
        show_default=False,
    ),
]
DrawSeed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the draw.")]
BatchTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens in a batch.")]
KeepStages = Annotated[
    bool,
    typer.Option("--keep-stages", help="Keep the results of earlier stages (documents of the recipe), in .OUT.stages."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start again; do not continue an interrupted run.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an earlier output, unless a file in it was added or changed."),
]
AllTensors = Annotated[bool, typer.Option("--tensors", help="List every tensor.")]

SHARD_SIZE = "5GB"


def chosen(**options: Any) -> dict[str, Any]:
    """Return the options that were given, so that the called function applies its own defaults for the others."""
    return {name: value for name, value in options.items() if value is not None}


def quieten_hub(quiet: bool = False) -> None:
    """Disable the Hub's progress bars if stderr is not a terminal, or if `quiet`."""
    if quiet or not on_terminal():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def many_values(*names: str) -> type[Verb]:
    """Return a command class in which the named options take every argument up to the next option."""

    class ManyValues(Verb):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, _spread(args, names))

    return ManyValues


def _spread(args: Sequence[str], names: Sequence[str]) -> list[str]:
    """Rewrite `--tasks a b` as `--tasks a --tasks b`."""
    found: list[str] = []
    current = None
    for arg in args:
        if arg in names:
            current = arg
            continue
        if arg.startswith("-") and arg != "-":
            current = None
        found += [arg] if current is None else [current, arg]
    return found


def check_output(folder: Path) -> None:
    """Refuse an output that is not there before torch is imported, which takes seconds.

    Raises:
        NotFoundError: There is no such folder.
    """
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")


def check_recipe_file(recipe: Path) -> None:
    """Refuse a recipe that cannot be read before torch is imported, which takes seconds; standard input is not touched.

    Raises:
        MergeError: There is no such file, or it is not YAML.
    """
    if str(recipe) != "-":
        from ..recipe.load import read_documents

        read_documents(recipe)
