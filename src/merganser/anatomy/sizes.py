"""Sizes that a config names and the tensors do not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..wording import brief
from .config import COUNT_KEYS, as_int, text_scopes
from .infer import Anatomy

__all__ = ["size_warnings"]


def size_warnings(config: Mapping[str, Any], anatomy: Anatomy) -> list[str]:
    """Compare the numbers of layers and tokens in a config with those of the tensors.

    What loads such a checkpoint gives the layers that are missing random weights, or leaves out those that are too many.

    Args:
        config: config.json.
        anatomy: Structure of the tensors that lie beside it.

    Returns:
        A sentence for each number that no stack of layers, or not the embedding, has.
    """
    warnings = []
    # layers of one group share their weights, which are stored once
    layers = _values(config, (*COUNT_KEYS, "num_hidden_groups"))
    if layers and anatomy.stacks and not {as_int(each) for each in layers} & set(anatomy.stacks.values()):
        warnings.append(f"config.json says {_shown(layers)} layers, the tensors have {anatomy.n_layers}")
    tokens = _values(config, ("vocab_size",))
    if tokens and anatomy.vocab_size is not None and anatomy.vocab_size not in {as_int(each) for each in tokens}:
        warnings.append(
            f"config.json says a vocabulary of {_shown(tokens)}, the embedding has {anatomy.vocab_size} rows"
        )
    return warnings


def _values(config: Mapping[str, Any], keys: tuple[str, ...]) -> list[int | float | str]:
    """Return what stands under any of the keys; lists and mappings under such names mean other things."""
    found = (scope.get(key) for scope in text_scopes(config) for key in keys)
    return [value for value in found if isinstance(value, int | float | str)]


def _shown(values: list[int | float | str]) -> str:
    return ", ".join(dict.fromkeys(brief(value) for value in values))
