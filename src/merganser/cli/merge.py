"""`merganser merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..wording import count_text, digits_text, number_text, plural, printable, size_text, time_text
from . import _options as options
from .printing.adapters import print_merged_adapter
from .printing.permutation import permutation_lines
from .printing.progress import merge_progress
from .printing.text import complain, head, say, say_json, share_text, table
from .printing.vocabulary import vocabulary_lines

if TYPE_CHECKING:
    from ..engine.plan.plan import Plan


def merge(
    recipe: options.RecipeFile,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; it appears when the merge is complete.")
    ],
    threads: options.Threads = None,
    device: options.Device = "cpu",
    out_shard_size: options.ShardSize = options.SHARD_SIZE,  # type: ignore[assignment]  # parsed like what is given
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    fresh: options.Fresh = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Merge NaN and infinity instead of refusing them.")
    ] = False,
    max_memory: options.MaxMemory = None,
    cache_dir: options.CacheDir = None,
    stream: options.Stream = False,
    keep_stages: options.KeepStages = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="A Ray cluster that shares storage with this machine.", show_default=False
        ),
    ] = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Merge models by a recipe into a new checkpoint.

    An interrupted merge is continued by the same command.
    """
    options.quieten_hub(quiet)
    from ..process import reuse_freed_memory
    from ..recipe import check_names, load_recipes

    reuse_freed_memory()
    recipes = load_recipes(recipe)
    check_names(recipes)  # report errors in the recipe before torch is imported
    from ..engine.merge import merge as merge_recipes

    given = options.chosen(threads=threads, device=device, out_shard_size=out_shard_size, seed=seed)
    given |= options.chosen(max_memory=max_memory, cache_dir=cache_dir, stream=stream or None)
    with merge_progress(quiet) as progress:
        result = merge_recipes(
            recipes,
            out,
            keep_stages=keep_stages,
            overwrite=overwrite,
            fresh=fresh,
            allow_nonfinite=allow_nonfinite,
            cluster=cluster,
            progress=progress,
            **given,
        )
    if json:
        say_json({"out": str(result.out), "record": result.record})
    elif "merged_adapters" in result.record and not quiet:
        print_merged_adapter(result.out, result.record, [recipe.name for recipe in recipes if recipe.name])
    elif not quiet:
        _summary(progress.plans[-1], result.out, result.record, [plan.recipe.name for plan in progress.plans[:-1]])


def _summary(plan: Plan, out: Path, record: Mapping[str, Any], stages: list[str | None]) -> None:
    from ..engine.plan.sections.census import census_text
    from ..engine.plan.summary import count_inputs
    from ..process import peak_memory

    with_base, count = count_inputs(plan)
    base = "a base and " if with_base else ""
    head(
        f"{record['method']} · {base}{plural(count, 'model')} · {plural(record['tensors'], 'tensor')} · "
        f"{count_text(record['parameters'])} parameters · {time_text(record['timings']['seconds'])} · "
        f"peak {size_text(peak_memory())}"
    )
    say(census_text(plan.census.values()))
    _lengths(record["movement"]["total"])
    _learnt(record["calibrations"])
    for warning in record["warnings"][len(plan.warnings) :]:
        complain("warning", warning)
    written = f"{plural(len(plan.shards), 'file')}, {size_text(plan.bytes_written)}"
    say(f"wrote {out} ({written}) and {out / 'merge.json'}")
    if record["vocabulary"] is not None:
        say(f"matched tokens (every change: {out / record['vocabulary']['list']})")
        for line in vocabulary_lines(record["vocabulary"]):
            say(plan.shown(line))
    if record["permutation"] is not None:
        say(f"aligned models to {plan.shown(record['permutation']['to'])}")
        for line in permutation_lines(record["permutation"]):
            say(plan.shown(line))
    if "sidecars" in record:
        _tasks(record["sidecars"])
    if stages:
        say(f"after the stages {', '.join(filter(None, stages))}")
    say(f"check it:  merganser verify {out}")
    if plan.sidecars:
        say(f"restore:   merganser restore {out} --task {plan.sidecars.tasks[0].name}")
    if plan.gguf is not None:
        say(f"run it:    llama-cli -m {out / plan.gguf.file}")
    elif plan.config:
        say(f'load it:   transformers.{_loader(plan.config)}.from_pretrained("{out}")')


def _loader(config: Mapping[str, Any]) -> str:
    """Return the class of transformers that loads the whole checkpoint; `AutoModel` would drop its head."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    own_code = config.get("auto_map")
    if isinstance(own_code, dict):
        return next((auto for auto, target in own_code.items() if str(target).endswith(f".{name}")), "AutoModel")
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "AutoModelForCausalLM"
    return name if name.isidentifier() else "AutoModel"


def _learnt(calibrations: Sequence[Mapping[str, Any]]) -> None:
    """Print how far the loss of each model's data fell, where coefficients were learnt."""
    found = {Path(own["folder"]).name: own["learning"] for own in calibrations if "learning" in own}
    counted = {name: own for name, own in found.items() if own["before"] is not None}
    if counted:
        steps = plural(next(iter(counted.values()))["steps"], "step")
        each = [f"{printable(name)} {own['before']:.4g} to {own['after']:.4g}" for name, own in counted.items()]
        say(f"learnt in {steps}; loss of a token, on the first step's sequences: {', '.join(each)}")


def _lengths(total: Mapping[str, Any]) -> None:
    """Print the length of the merged task vector, those of the models, and how much of these is rounding."""
    length, count = total.get("length"), len(total.get("models", ()))
    rounding = [share for share in total.get("rounding", ()) if share is not None]
    if length is None or not rounding:
        return
    shares = " to ".join(dict.fromkeys(f"{share:.1%}" for share in (min(rounding), max(rounding))))
    unrelated = (
        f" (unrelated models: {digits_text(count**-0.5)} averaged, {digits_text(count**0.5)} added)"
        if count > 1
        else ""
    )
    say(
        f"moved {digits_text(length)} times as far from the base as the models{unrelated}; "
        f"{shares} of the models' task vectors is rounding"
    )


def _tasks(sidecars: Mapping[str, Any]) -> None:
    """Print what was stored for each model, and how far each restored model is from the original."""
    shared = f", and {size_text(sidecars['shared_bytes'])} for all" if sidecars["shared_bytes"] else ""
    base = "with the base" if sidecars["needs_base"] else "without the base"
    say(f"keeps {plural(len(sidecars['tasks']), 'task')}{shared}; they are restored {base}, with a relative error")
    rows = [["task", "size", "", "of the model", "of its task vector", "of its worst tensor"]]
    rows += [
        [
            task["name"],
            size_text(task["bytes"]),
            share_text(task["bytes"], task["full_bytes"]),
            number_text(task["error"]),
            number_text(task["error_of_task_vector"]),
            f"{number_text(task['worst']['error'])} ({task['worst']['tensor']})",
        ]
        for task in sidecars["tasks"]
    ]
    for line in table(rows, right=(1, 3, 4)):
        say(line)
