"""Prefixes that training frameworks add to the names of tensors; stripped when a checkpoint is opened."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..errors import CheckpointError
from ..wording import some
from .files.weights import TRAINER_SUFFIX
from .tensor import TensorInfo, renamed

__all__ = ["unwrap", "unwrapped_names"]

# Wrappers of single modules add a name at any depth: torch.compile, FSDP, activation checkpointing, DeepSpeed.
_MODULES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
_ANYWHERE = re.compile("|".join(map(re.escape, _MODULES)))
# Wrappers of the whole model: DataParallel and DDP, PEFT. A model may have a part of such a name, so a prefix is
# stripped only if all tensors have it.
_AROUND = ("module.", "base_model.model.")
# Training code that holds a causal language model as one of its parts (Lightning, policy trainers).
_AROUND_DECODER = re.compile(r"(?:model|policy|actor|student|llm)\.(?=(?:model|lm_head)\.)")
# Whatever name a trainer has for the model, before one that only a model of transformers begins with.
_HELD = re.compile(
    r"((?:\w+\.)+?)(?:model\.(?:layers|embed_tokens|decoder)|lm_head|transformer\.(?:h|word_embeddings)|gpt_neox|bert|roberta)\."
)


def unwrap(
    where: str, tensors: Mapping[str, TensorInfo], *, trained: bool = False
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the tensors by the names that the model itself uses, and the prefixes that were stripped.

    Args:
        where: The checkpoint, for messages.
        tensors: Tensors by their names in the files.
        trained: Whether they lay beside the state of a training: whatever is in front of all names is stripped then.

    Raises:
        CheckpointError: Two tensors would have the same name; a trainer's file holds more than its model.
    """
    if trained and (held := _held(where, tensors)):
        inner = {name.removeprefix(held): renamed(own, name.removeprefix(held)) for name, own in tensors.items()}
        tensors, wrappers = unwrap(where, inner)
        return tensors, sorted({*wrappers, held})
    together = "\n".join(tensors)
    if not any(module in together for module in _MODULES) and not _around(tensors):
        return dict(tensors), []
    names, stripped = unwrapped_names(where, tensors)
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
    while around := _around(unwrapped.values()):
        unwrapped = {name: new.removeprefix(around) for name, new in unwrapped.items()}
        stripped.add(around)
        if around not in _AROUND:
            break
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


def _held(where: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return what a trainer puts in front of the names of its model, if all names have it."""
    found = next((match[1] for name in tensors if (match := _HELD.match(name))), None)
    others = [name for name in tensors if found is not None and not name.startswith(found)]
    if not others:
        return found
    file = tensors[others[0]].file
    if file.suffix != TRAINER_SUFFIX:
        return None
    raise CheckpointError(
        f"{where}: the model is under {found!r}, and beside it are {some(others, 3)}; take the model out, and put config.json in "
        f"its folder: python -c \"import torch; s = torch.load('{file.name}', map_location='cpu', weights_only=True)['state_dict']; "
        f"torch.save({{k.removeprefix('{found}'): v for k, v in s.items() if k.startswith('{found}')}}, 'pytorch_model.bin')\""
    )


def _around(names: Iterable[str]) -> str | None:
    """Return the prefix of a wrapper of the whole model that all names have; None if there is none."""
    first = next(iter(names), "")
    decoder = _AROUND_DECODER.match(first)
    prefixes = [prefix for prefix in _AROUND if first.startswith(prefix)]
    for prefix in prefixes:
        if all(name.startswith(prefix) for name in names):
            return prefix
    if decoder and all((match := _AROUND_DECODER.match(name)) and match[0] == decoder[0] for name in names):
        return decoder[0]
    return None
