"""Match old and new tensor names of one architecture, as transformers does when it loads a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...checkpoint import Checkpoint, matched
from .meta_model import build_model

__all__ = ["Loaded", "load_names", "named_alike"]


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
    donor_names = {loaded[name]: name for name in donor.tensors if name in loaded}
    pairs = {name: donor_names[loaded[name]] for name in sorted(odd) if loaded.get(name) in donor_names}
    # skip parameters that are split into several tensors, and tensors stored under both names: neither is a renaming
    targets = list(pairs.values())
    pairs = {n: new for n, new in pairs.items() if targets.count(new) == 1 and new not in checkpoint.tensors}
    if not pairs:
        return checkpoint, []
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        new = pairs.get(name, name)
        tensors[new] = matched(tensor, new)
    old, new = next(iter(pairs.items()))
    message = (
        f"{where}: {len(pairs)} tensors have the names of another version of {kind}; matched as transformers loads them: "
        f"{old} is {new}{', ...' if len(pairs) > 1 else ''}"
    )
    return replace(checkpoint, tensors=tensors), [message]


def _names_in_memory(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return the parameter to which transformers loads each tensor name; empty if that is unknown."""
    model = build_model(config)
    loaded = None if model is None or isinstance(model, str) else load_names(model, names, converting=False)
    return {} if loaded is None else loaded.targets


@dataclass(frozen=True, slots=True)
class Loaded:
    """Where transformers loads the tensors of a file.

    Args:
        targets: The parameter by the tensor's name; the first one if a tensor is split.
        converted: Names of tensors that are split, joined or transposed, so that shapes differ.
        parameters: All parameters that get values.
    """

    targets: dict[str, str]
    converted: set[str]
    parameters: set[str]


def load_names(model: Any, names: Iterable[str], *, converting: bool = True) -> Loaded | None:
    """Return where transformers would load tensors of these names; None if that is unknown.

    Args:
        model: From `build_model`.
        names: Names of tensors in a file.
        converting: Also follow tensors that are split or joined, such as those of experts, to their parameter.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        # before version 5, transformers renamed tensors only while loading them
        return None
    state, prefix = model.state_dict(), model.base_model_prefix
    loaded = Loaded({}, set(), set())
    try:
        entries = get_model_conversion_mapping(model)
        renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in entries if converting and isinstance(entry, WeightConverter)]
        splits = {source: each.target_patterns for each in converters for source in each.source_patterns}
        for name in names:
            target, source = rename_source_key(name, renamings, converters, prefix, state)
            loaded.targets[name] = target
            if source is not None:
                loaded.converted.add(name)
            for pattern in splits[source] if source is not None else [""]:
                # only the first part of a split tensor is returned
                loaded.parameters.add(target.replace(splits[source][0], pattern) if source is not None else target)
    except (AttributeError, KeyError, TypeError):
        # these functions are not public API of transformers and may change
        return None
    return loaded
