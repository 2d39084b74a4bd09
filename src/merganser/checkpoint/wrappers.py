"""Names that training frameworks put around those of a model: stripped when a checkpoint is opened."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import CheckpointError
from .tensor import TensorInfo, renamed

__all__ = ["unwrap"]

# What wraps a module keeps it under a name of its own, at any depth: torch.compile, FSDP, activation checkpointing,
# DeepSpeed.
_ANYWHERE = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# What wraps the whole model: DataParallel and DDP, PEFT. Models may have parts of these names, so all tensors must be
# inside.
_AROUND = ("module.", "base_model.model.")
# What trains a causal language model as a part of something else (Lightning, trainers of policies).
_AROUND_DECODER = re.compile(r"(?:model|policy|actor|student|llm)\.(?=(?:model|lm_head)\.)")


def unwrap(where: str, tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the tensors by the names that the model gives them, and the wrappers' names that were stripped.

    Args:
        where: The checkpoint, for messages.
        tensors: By their names in the files.

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
