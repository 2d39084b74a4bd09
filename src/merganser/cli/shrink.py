"""`merganser shrink`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from ..wording import count_text, plural, size_text, time_text
from . import _options as options
from .printing.progress import merge_progress
from .printing.text import head, say, say_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..mixture.shrinking import Shrinking


def shrink(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A mixture of experts: a folder, or a Hub id.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it appears when it is complete.")],
    experts: Annotated[
        int, typer.Option(min=1, metavar="N", help="Experts of each layer of the output.", show_default=False)
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE...",
            help="Texts to observe the experts on (.txt, .jsonl, .parquet).",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="reap (drops experts), ream, msmoe, hc_smoe, sub_moe or merge_moe.")
    ] = "reap",
    per_token: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Experts that compute each token.  [default: as in the model, or all that are left]",
            show_default=False,
        ),
    ] = None,
    sequences: options.Sequences = None,
    length: options.SequenceLength = None,
    seed: options.DrawSeed = 0,
    out_shard_size: options.ShardSize = options.SHARD_SIZE,  # type: ignore[assignment]  # parsed like what is given
    overwrite: options.Overwrite = False,
    fresh: options.Fresh = False,
    cache_dir: options.CacheDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what it would do; write nothing.")] = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Reduce the number of experts of a mixture of experts.

    Experts of every layer are merged or dropped, by what they do on text; one layer is in memory at a time.
    """
    options.quieten_hub(quiet)
    from ..mixture.shrinking import plan_shrinking
    from ..mixture.shrinking import shrink as run

    if not data:
        raise DataError("--data is missing: name files of text, on which the experts are observed")
    given: dict[str, Any] = {"experts": experts, "method": method, "per_token": per_token, "sequences": sequences}
    given |= {"length": length, "seed": seed, "cache_dir": cache_dir}
    if dry_run:
        _show(plan_shrinking(model, data, **given), json=json)
        return
    with merge_progress(quiet) as progress:
        result = run(
            model,
            data,
            out,
            overwrite=overwrite,
            fresh=fresh,
            out_shard_size=out_shard_size,
            advance=partial(progress.calibrating, model),
            progress=progress,
            **given,
        )
    if json:
        say_json({"out": str(result.out), "record": result.record})
    elif not quiet:
        _summary(result.out, result.record)


def _show(plan: Shrinking, *, json: bool) -> None:
    if json:
        say_json(asdict(plan))
        return
    sizes = plan.sizes
    head(f"shrinking {plan.model} by {plan.method}")
    say(f"experts: {sizes.before} -> {sizes.after} in each of {plural(plan.layers, 'layer')}")
    say(f"per token: {sizes.chosen} -> {sizes.chosen_after}")
    say(f"parameters: {count_text(plan.parameters)} -> {count_text(plan.parameters_after)}")
    say(f"observed on {plural(plan.sequences, 'sequence')}, {plural(plan.tokens, 'token')}")
    say(f"the experts of a layer in memory: {size_text(plan.expert_bytes)}, and as much again for their block")


def _summary(out: Path, record: Mapping[str, Any]) -> None:
    from ..process import peak_memory

    found = record["mixture"]
    head(
        f"{found['shrunk_by']} · {found['experts_before']} -> {plural(found['experts'], 'expert')}, "
        f"{found['experts_per_token']} per token · {count_text(record['parameters'])} parameters · "
        f"{time_text(record['timings']['seconds'])} · peak {size_text(peak_memory())}"
    )
    sizes = [len(own) for each in found["groups"].values() for own in each]
    say(f"each new expert is made of {min(sizes)} to {max(sizes)}; merge.json lists them by layer")
    say(f"wrote {out} and {out / 'merge.json'}")
    say(f'load it:   transformers.AutoModelForCausalLM.from_pretrained("{out}")')
