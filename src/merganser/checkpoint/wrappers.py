"""Prefixes that training frameworks add to the names of tensors; stripped when a checkpoint is opened."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import CheckpointError
from .tensor import TensorInfo, renamed

__all__ = ["unwrap"]

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
    names = {name: _ANYWHERE.sub("", name) for name in tensors}
    stripped = {found for name in tensors for found in _ANYWHERE.findall(name)}
    while around := next((prefix for prefix in _AROUND if all(new.startswith(prefix) for new in names.values())), None):
        names = {name: new.removeprefix(around) for name, new in names.items()}
        stripped.add(around)
    inside = {match[0] for new in names.values() if (match := _AROUND_DECODER.match(new))}
    if len(inside) == 1 and all(_AROUND_DECODER.match(new) for new in names.values()):
        names = {name: _AROUND_DECODER.sub("", new, count=1) for name, new in names.items()}
        stripped |= inside
    if not stripped:
        return dict(tensors), []
    unwrapped: dict[str, TensorInfo] = {}
    holders: dict[str, str] = {}
    for name, new in names.items():
        if not new:
            raise CheckpointError(f"{where}: tensor {name!r} has no name but that of a training framework")
        if new in holders:
            raise CheckpointError(
                f"{where}: tensors {holders[new]!r} and {name!r} would both be called {new!r} without the names "
                "of their training framework; keep one of them"
            )
        holders[new] = name
        unwrapped[new] = renamed(tensors[name], new)
    return unwrapped, sorted(stripped)
