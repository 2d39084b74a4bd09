"""`merganser mix`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..wording import count_text, number_text, plural, size_text, time_text
from . import _options as options
from .printing.progress import merge_progress, step_progress
from .printing.text import head, say, say_json


def mix(
    recipe: options.RecipeFile,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; it appears when the mixture is complete.")
    ],
    threads: options.Threads = None,
    out_shard_size: options.ShardSize = options.SHARD_SIZE,  # type: ignore[assignment]  # parsed like what is given
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    fresh: options.Fresh = False,
    max_memory: options.MaxMemory = None,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Build a mixture of experts from dense models; join mixtures.

    RECIPE names a base and experts; recipes of mergekit-moe run unchanged. With the key join it names mixtures of one shared
    part, such as FlexOlmo's contributors.
    """
    options.quieten_hub(quiet)
    options.check_recipe_file(recipe)
    from ..engine.output.staging import check_target
    from ..engine.run import run_plan
    from ..mixture import load_mixture, plan_mixture

    found = load_mixture(recipe)
    check_target(out, overwrite=overwrite)
    given = options.chosen(threads=threads, out_shard_size=out_shard_size, seed=seed)
    given |= options.chosen(max_memory=max_memory, cache_dir=cache_dir)
    with step_progress("routers", quiet) as advance:
        plan = plan_mixture(found, advance=advance, **given)
    with merge_progress(quiet) as progress:
        result = run_plan(plan, out, overwrite=overwrite, fresh=fresh, progress=progress)
    if json:
        say_json({"out": str(result.out), "record": result.record})
    elif not quiet:
        _summary(result.out, result.record)


def _summary(out: Path, record: Mapping[str, Any]) -> None:
    from ..process import peak_memory

    mixture = record["mixture"]
    head(
        f"{mixture['architecture']} · {plural(len(mixture['experts']), 'expert')}, {mixture['experts_per_token']} per token · "
        f"{count_text(record['parameters'])} parameters · {time_text(record['timings']['seconds'])} · "
        f"peak {size_text(peak_memory())}"
    )
    if mixture["gate_mode"] == "joined":
        say(f"compared {plural(mixture['router']['compared'], 'shared tensor')}, bit for bit")
    else:
        say(f"shared parts: {record['method']}; routers: {mixture['gate_mode']}")
    for line in _router_lines(mixture["router"]):
        say(line)
    say(f"wrote {out} and {out / 'merge.json'}")
    say(f'load it:   transformers.AutoModelForCausalLM.from_pretrained("{out}")')


def _router_lines(router: Mapping[str, Any]) -> list[str]:
    """Return what is known of the routers."""
    if router.get("right") is None:
        return []
    found = [
        f"first choice is the right expert for {router['right']:.1%} of {router['tried_on']}, on average over layers "
        f"(lowest {router['worst_right']:.1%}, in layer {router['worst_layer']})"
    ]
    condition = router["largest_condition"]
    known = (
        "rows depend on each other in some layer" if condition is None else f"condition up to {number_text(condition)}"
    )
    found.append(f"the busiest expert of any layer gets {router['largest_load']:.1%} of these; {known}")
    return found
