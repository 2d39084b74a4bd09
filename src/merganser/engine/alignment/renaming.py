"""Match old and new tensor names of one architecture, as transformers does when it loads a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...checkpoint import Checkpoint, renamed
from .meta_model import build_model

__all__ = ["named_alike"]


def named_alike(where: str, checkpoint: Checkpoint, donor: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint with the donor's names for tensors that transformers loads as the same parameter.

    Transformers is used only if names differ, as importing it takes longer than planning a merge. Names stay unchanged
    without it, and for classes that it does not know.

    Args:
        where: The checkpoint as the recipe names it.
        checkpoint: An input.
        donor: Checkpoint whose names are used.

    Returns:
        The checkpoint, and messages about what was renamed.
    """
    odd = checkpoint.tensors.keys() - donor.tensors.keys()
    kind = checkpoint.config.get("model_type")
    if not odd or not donor.tensors.keys() - checkpoint.tensors.keys() or kind != donor.config.get("model_type"):
        return checkpoint, []
    loaded = _names_in_memory(donor.config, [*donor.tensors, *odd])
    own = {loaded[name]: name for name in donor.tensors if name in loaded}
    pairs = {name: own[loaded[name]] for name in sorted(odd) if loaded.get(name) in own}
    # skip parameters that are split into several tensors, and tensors stored under both names: neither is a renaming
    targets = list(pairs.values())
    pairs = {n: new for n, new in pairs.items() if targets.count(new) == 1 and new not in checkpoint.tensors}
    if not pairs:
        return checkpoint, []
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        new = pairs.get(name, name)
        tensors[new] = renamed(tensor, new)
    old, new = next(iter(pairs.items()))
    message = (
        f"{where}: {len(pairs)} tensors are named as by another version of {kind}, and matched as transformers loads them: "
        f"{old} is {new}{', ...' if len(pairs) > 1 else ''}"
    )
    return replace(checkpoint, tensors=tensors), [message]


def _names_in_memory(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return the parameter to which transformers loads each tensor name; empty if that is unknown."""
    model = build_model(config)
    if model is None or isinstance(model, str):
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        # before version 5, transformers renamed tensors only while loading them
        return {}
    state, prefix = model.state_dict(), model.base_model_prefix
    try:
        renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
        return {name: rename_source_key(name, renamings, [], prefix, state)[0] for name in names}
    except (AttributeError, TypeError):
        # these functions are not public API of transformers and may change
        return {}
