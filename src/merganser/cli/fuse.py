"""`merganser fuse`: train one model on what others predict, or blend answers of several."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from . import _options as options
from ._errors import Verb, Verbs
from .printing.progress import named_progress, step_progress
from .printing.text import count_text, head, number_text, plural, say, say_json, size_text, table, time_text

if TYPE_CHECKING:
    from ..distillation import Blended
    from ..distillation.training.preparation import FusionPlan

fuse = typer.Typer(
    cls=Verbs, help="Train a model on others' predictions, or blend their answers.", no_args_is_help=True
)


@fuse.callback()
def _group() -> None:
    """Train a model on others' predictions, or blend their answers."""


@fuse.command(cls=options.many_values("--data"))
def cache(
    model: options.Model,
    data: options.DataFiles = None,
    out: options.NewFolder = None,
    top: Annotated[
        int, typer.Option(min=1, metavar="K", help="Number of most likely tokens stored per position.")
    ] = 32,
    sequences: options.Sequences = None,
    length: options.SequenceLength = None,
    seed: options.DrawSeed = 0,
    tokens: Annotated[str, typer.Option(metavar="all|completions", help="Which tokens are marked to count.")] = "all",
    batch_tokens: options.BatchTokens = 512,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Store what a model predicts at every position of some texts."""
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


@fuse.command(cls=options.many_values("--data"))
def disperse(
    model: options.Model,
    data: options.DataFiles = None,
    out: options.NewFolder = None,
    clusters: Annotated[int, typer.Option(min=1, metavar="K", help="Number of clusters.")] = 4,
    length: options.SequenceLength = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the first centres.")] = 0,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Divide records into clusters, to train a model on each.

    MODEL embeds the records; its last hidden states are averaged over each.
    """
    options.quieten_hub(quiet)
    from ..distillation import disperse as run

    if out is None:
        raise DataError("--out is missing: give the folder to write")
    with step_progress("embedding", quiet) as progress:
        found = run(
            model, data or [], out, clusters=clusters, length=length, seed=seed, cache_dir=cache_dir, progress=progress
        )
    if json:
        say_json({"out": str(found.path), "clusters": found.sizes})
    elif not quiet:
        for name, size in found.sizes.items():
            say(f"{found.path / name}: {plural(size, 'record')}")


@fuse.command(cls=Verb)
def train(
    recipe: options.RecipeFile,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; it appears when the model is complete.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what it would do; write nothing.")] = False,
    control: Annotated[
        bool,
        typer.Option(
            "--control/--no-control",
            help="Also train the student without its sources, on the same batches, to compare with.",
        ),
    ] = True,
    device: options.Device = "auto",
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Train a student on what other models predict.

    RECIPE names the student, its sources, data and the loss. A killed run is continued by the same command.
    """
    options.quieten_hub(quiet)
    from ..distillation import fuse as run
    from ..distillation import load_fusion
    from ..distillation.training.preparation import prepare_fusion

    loaded = load_fusion(recipe)
    if dry_run:
        with ExitStack() as stack:
            plan = prepare_fusion(loaded, stack, cache_dir=cache_dir).plan(control=control)
        _show(plan, json=json)
        return
    with named_progress(quiet) as progress:
        result = run(loaded, out, control=control, device=device, cache_dir=cache_dir, progress=progress)
    if json:
        say_json({"out": str(result.out), "record": result.record})
    elif not quiet:
        _summary(result.out, result.record)


@fuse.command(cls=Verb)
def answer(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Models that answer: checkpoints, MODEL+ADAPTER, or recipes (merged in memory); NAME=MODEL names one.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help="Lines of JSON with a prompt, or with messages.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The file to write, a line per prompt.", show_default=False)
    ],
    ranker: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A reward model, which scores every answer.", show_default=False),
    ] = None,
    rank_command: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Instead of a ranker: a command that reads a line of JSON per prompt and prints a list of scores.",
            show_default=False,
        ),
    ] = None,
    fuser: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="A model that reads the best answers and writes another one.", show_default=False
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Number of answers that the fuser reads.")] = 3,
    each: Annotated[int, typer.Option(min=1, metavar="K", help="Answers of each model to each prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="Sampling temperature; 0 takes the most likely token.")
    ] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="P",
            help="Sample from the most likely tokens that have this probability together.",
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the draws.")] = 0,
    batch_tokens: options.BatchTokens = 4096,
    device: options.Device = "auto",
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Let several models answer, and another combine the best.

    Answers are stored beside the file: a killed run continues, and a run with another ranker or fuser uses them again.
    """
    options.quieten_hub(quiet)
    from ..distillation import blend_answers

    started = time.monotonic()
    with named_progress(quiet) as progress:
        found = blend_answers(
            models,
            prompts,
            out,
            ranker=ranker,
            rank_command=rank_command,
            fuser=fuser,
            top=top,
            each=each,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch_tokens=batch_tokens,
            device=device,
            cache_dir=cache_dir,
            progress=progress,
        )
    if json:
        say_json(found.to_json())
    elif not quiet:
        _blended(found, each, time.monotonic() - started)


def _blended(found: Blended, each: int, seconds: float) -> None:
    from ..process import peak_memory

    count = len(found.one)
    head(
        f"{plural(count, 'model')} · {plural(found.prompts, 'prompt')} · {plural(each, 'answer')} each · "
        f"{time_text(seconds)} · peak {size_text(peak_memory())}"
    )
    if found.chosen is not None:
        say("mean score")
        rows = [["", "an answer", f"best of {each}", "chosen"]]
        rows += [
            [name, _score(one), _score(found.best[name]), str(found.times[name])] for name, one in found.one.items()
        ]
        rows.append([f"best of {each * count}", "", _score(found.chosen), str(found.prompts)])
        if found.fused is not None:
            rows.append(["fused", _score(found.fused), "", ""])
        for line in table(rows, right=range(1, 4)):
            say(line)
    if found.cut:
        say(f"cut at the most tokens: {found.cut} of {plural(found.prompts * each * count, 'answer')}")
    if found.unwritten:
        say(f"not fused, as not even one answer fits into what the fuser can see: {plural(found.unwritten, 'prompt')}")
    say(f"wrote {found.out}; the answers are kept in {found.kept}")


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _show(plan: FusionPlan, *, json: bool) -> None:
    if json:
        say_json(asdict(plan))
        return
    head(f"fusing into {plan.student}: {count_text(plan.parameters)} parameters, {count_text(plan.trained)} trained")
    say(f"{plural(plan.sequences, 'sequence')}, {plural(plan.tokens, 'token')}")
    if plan.to_run:
        say(f"to run: {plural(len(plan.to_run), 'source')}, {plural(sum(plan.to_run.values()), 'token')} in all")
    each = "" if plan.models == 1 else ", for the fused model and again for the control"
    say(
        f"{plural(plan.steps, 'step')} of about {number_text(round(plan.tokens_per_step))} tokens: every sequence "
        f"{plan.passes:.1f} times{each}"
    )
    say(f"memory: about {size_text(plan.memory)}, and the activations of a part of a batch")


def _summary(out: Path, record: Mapping[str, Any]) -> None:
    from ..process import peak_memory

    found = record["fused"]
    head(
        f"{plural(len(found['sources']), 'source')} · {plural(found['sequences'], 'sequence')} · "
        f"{plural(found['steps'], 'step')} · {time_text(record['timings']['seconds'])} · peak {size_text(peak_memory())}"
    )
    for own in found["sources"]:
        share = 100 * own["tokens_taught"] / max(1, found["tokens"])
        say(
            f"{own['source']} teaches {share:.1f}% of {plural(found['tokens'], 'token')}, {own['nats_per_token']:.3f} nats each"
        )
    if found["sequences_without_a_source"]:
        say(f"{plural(found['sequences_without_a_source'], 'sequence')} left out: no source reads the same text")
    texts = list(found["bits_per_byte"]["student"])
    if texts:
        say("bits per byte of held-out text")
        rows = [["model", *texts]]
        rows += [[name, *(f"{own[text]:.4f}" for text in texts)] for name, own in found["bits_per_byte"].items()]
        for line in table(rows, right=range(1, len(texts) + 1)):
            say(line)
    else:
        say("the recipe names no held_out text, so nothing was measured")
    say(f"wrote {out} and {out / 'merge.json'}")
    say(f'load it:   transformers.AutoModelForCausalLM.from_pretrained("{out}")')
