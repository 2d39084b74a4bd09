"""Models that are opened, but not yet read, of every kind that a user can name: stored ones, and recipes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..jsonfile import exists
from ..recipe import Recipe, load_recipe, load_recipes
from ..version import __version__
from .stored import Source, hash_checkpoint, hash_of, open_stored, xxh3_of_file

if TYPE_CHECKING:
    from ..engine.in_memory.run import Memory

Reference = str | Path | Recipe | Mapping[str, Any]
"""A model: a path or Hub id, a loaded recipe, or a recipe as a mapping."""

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


def split_name(text: str) -> tuple[str | None, str]:
    """Split `NAME=REFERENCE`; the name is None if there is none, or if the whole text is an existing path."""
    match = _NAMED.fullmatch(text)
    if match is None or exists(text):
        return None, text
    return match[1], match[2]


def open_source(
    reference: Reference, stack: ExitStack, *, cache_dir: Path | None = None, memory: Memory | None = None
) -> Source:
    """Open a model.

    Args:
        reference: A folder, a weight file, a Hub id (`org/name@revision`), `MODEL+ADAPTER`, `OUT#TASK` (a task
            of a merge with sidecars), a recipe (`.yaml`), or a recipe,
            loaded or as a mapping.
        stack: Deletes temporary results of earlier stages of a recipe when it is closed, after the evaluation.
        cache_dir: Folder for models from the Hub.
        memory: Memory that merges share; then what is read of a recipe is valid until the next one is.

    Raises:
        MergeError: It does not exist, is damaged, or is a recipe that cannot be merged.
    """
    if isinstance(reference, Mapping):
        reference = load_recipe(reference)
    if isinstance(reference, Recipe):
        return _open_recipe([reference], reference.name or "recipe", stack, cache_dir, memory)
    text = str(reference)
    if text.endswith((".yaml", ".yml")) and not Path(text).is_dir():
        return _open_recipe(load_recipes(text), text, stack, cache_dir, memory)
    return open_stored(text, cache_dir=cache_dir)


def _open_recipe(
    recipes: Sequence[Recipe], text: str, stack: ExitStack, cache_dir: Path | None, memory: Memory | None
) -> Source:
    """Plan a recipe; earlier stages are merged immediately, into a temporary folder."""
    from ..anatomy.settings.config import unquantised
    from ..engine.in_memory.run import merge_to_state_dict
    from ..engine.merge import plan_with_stages_made
    from ..engine.record import data_files

    plan = stack.enter_context(plan_with_stages_made(recipes, **({"cache_dir": cache_dir} if cache_dir else {})))
    inputs = [hash_checkpoint(checkpoint) for checkpoint in plan.checkpoints.values()]
    inputs += [xxh3_of_file(file) for file in data_files(plan)]
    settings = [__version__, *(recipe.text for recipe in recipes), str(plan.seed), str(plan.method.version)]
    digest = hash_of(*settings, *inputs)
    return Source(
        reference=text,
        kind="recipe",
        config=unquantised(plan.config),
        files=plan.side_files,
        texts={} if plan.chat_template is None else {"chat_template.jinja": plan.chat_template},
        make_hash=lambda: digest,
        read=lambda: merge_to_state_dict(plan, memory=memory),
    )
