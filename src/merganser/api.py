"""The Python interface: what the command line calls, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from .engine.plan import Plan
    from .engine.run import Progress, Result

_Source = Recipe | str | Path | Mapping[str, Any]


def plan(recipe: _Source, **options: Any) -> Plan:
    """Plan a merge from the headers of its inputs; nothing is written.

    Args:
        recipe: A recipe, the path of one, its YAML text, or the same as a mapping.
        **options: As for `merganser.engine.plan.build_plan`: `seed`, `out_shard_size`, `threads`, `device`,
            `cache_dir`, `compiled`.

    Raises:
        MergeError: The recipe or its inputs cannot be merged; the message says why.
    """
    from .engine.plan import build_plan

    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if loaded.random_seed is not None:
        options.setdefault("seed", loaded.random_seed)
    return build_plan(loaded, **options)


def merge(
    recipe: _Source,
    out: str | Path,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Merge models into a new checkpoint.

    Args:
        recipe: A recipe, the path of one, its YAML text, or the same as a mapping.
        out: Target folder; it appears, complete, when the merge is done.
        overwrite: Replace a target that merganser wrote before.
        fresh: Start again even where an interrupted run could be continued.
        allow_nonfinite: Merge NaN and infinity instead of refusing them.
        progress: Told how the run advances.
        **options: As for `plan`.

    Returns:
        The folder and the run record.

    Raises:
        MergeError: The recipe, an input or the target is at fault; the message says why.
    """
    from .engine.run import run_plan

    return run_plan(
        plan(recipe, **options),
        Path(out),
        overwrite=overwrite,
        fresh=fresh,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )
