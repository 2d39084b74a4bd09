"""Prefixes that training frameworks add to the names of tensors; stripped when a checkpoint is opened."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..errors import CheckpointError
from .tensor import TensorInfo, renamed

__all__ = ["unwrap", "unwrapped_names"]

# Wrappers of single modules add a name at any depth: torch.compile, FSDP, activation checkpointing, DeepSpeed.
_ANYWHERE = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# Wrappers of the whole model: DataParallel and DDP, PEFT. A model may have a part of such a name, so a prefix is
# stripped only if all tensors have it.
_AROUND = ("module.", "base_model.model.")
# Training code that holds a causal language model as one of its parts (Lightning, policy trainers).
_AROUND_DECODER = re.compile(r"(?:model|policy|actor|student|llm)\.(?=(?:model|lm_head)\.)")


def unwrap(where: str, tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the tensors by the names that the model itself uses, and the prefixes that were stripped.

    Args:
        where: The checkpoint, for messages.
        tensors: Tensors by their names in the files.

    Raises:
        CheckpointError: Two tensors would have the same name.
    """
    names, stripped = unwrapped_names(where, tensors)
    if not stripped:
        return dict(tensors), []
    return {new: renamed(tensors[name], new) for name, new in names.items()}, stripped


def unwrapped_names(where: str, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return for each name the one that the model itself uses, and the prefixes that were stripped.

    Args:
        where: What has the names, for messages.
        names: Names of tensors.

    Raises:
        CheckpointError: Two tensors would have the same name.
    """
    unwrapped = {name: _ANYWHERE.sub("", name) for name in names}
    stripped = {prefix for name in unwrapped for prefix in _ANYWHERE.findall(name)}
    while around := next((p for p in _AROUND if unwrapped and all(n.startswith(p) for n in unwrapped.values())), None):
        unwrapped = {name: new.removeprefix(around) for name, new in unwrapped.items()}
        stripped.add(around)
    inside = {match[0] for new in unwrapped.values() if (match := _AROUND_DECODER.match(new))}
    if len(inside) == 1 and all(_AROUND_DECODER.match(new) for new in unwrapped.values()):
        unwrapped = {name: _AROUND_DECODER.sub("", new, count=1) for name, new in unwrapped.items()}
        stripped |= inside
    holders: dict[str, str] = {}
    for name, new in unwrapped.items() if stripped else ():
        if not new:
            raise CheckpointError(f"{where}: tensor {name!r} has no name but that of a training framework")
        if new in holders:
            raise CheckpointError(
                f"{where}: tensors {holders[new]!r} and {name!r} would both be called {new!r} without the names "
                "of their training framework; keep one of them"
            )
        holders[new] = name
    return unwrapped, sorted(stripped)
