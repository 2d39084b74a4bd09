"""Sizes that a config names and the tensors do not have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..wording import brief
from .infer import Anatomy, Shape
from .settings.config import COUNT_KEYS, as_int, text_scopes

__all__ = ["size_warnings"]

_POSITIVE = (
    *COUNT_KEYS,
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "vocab_size", "head_dim"),
    *("num_attention_heads", "n_head", "num_key_value_heads"),
)
"""Sizes and counts that cannot be zero or negative. Some classes have a list of them, with an entry per layer."""

_OTHER_WIDTHS = ("embedding_size", "word_embed_proj_dim", "d_embed", "embedding_dim", "emb_dim")
"""Width of the embedding in classes that project it to the width of the layers."""


def size_warnings(config: Mapping[str, Any], anatomy: Anatomy, shapes: Mapping[str, Shape]) -> list[str]:
    """Compare the sizes in a config with each other and with those of the tensors.

    A program that loads such a checkpoint gives missing layers random weights, leaves out additional ones, or fails.

    Args:
        config: config.json.
        anatomy: Structure of the tensors.
        shapes: Every tensor name and its shape.

    Returns:
        A sentence for each size that cannot be, or that the tensors do not have.
    """
    if wrong := list(_impossible(config)):
        return wrong
    return [*_wrong_counts(config, anatomy), *_wrong_widths(config, anatomy, shapes)]


def _impossible(config: Mapping[str, Any]) -> Iterator[str]:
    for scope in text_scopes(config):
        for key in _POSITIVE:
            value = scope.get(key)
            if isinstance(value, bool | float | str) or (as_int(value) or 1) < 1 or value == 0:
                yield f"config.json says {key} is {brief(value)}, which must be a whole number of at least 1"
        heads, shared = as_int(scope.get("num_attention_heads")), as_int(scope.get("num_key_value_heads"))
        if heads and shared and heads > 0 and shared > 0 and heads % shared:
            yield f"config.json says num_attention_heads is {heads}, which num_key_value_heads ({shared}) does not divide"


def _wrong_counts(config: Mapping[str, Any], anatomy: Anatomy) -> Iterator[str]:
    # layers of one group share their weights, which are stored once
    layers = _values(config, (*COUNT_KEYS, "num_hidden_groups"))
    if layers and anatomy.stacks and not set(layers) & set(anatomy.stacks.values()):
        yield f"config.json says {_shown(layers)} layers, the tensors have {anatomy.n_layers}"
    tokens = _values(config, ("vocab_size",))
    if tokens and anatomy.vocab_size is not None and anatomy.vocab_size not in tokens:
        yield f"config.json says a vocabulary of {_shown(tokens)}, the embedding has {anatomy.vocab_size} rows"


def _wrong_widths(config: Mapping[str, Any], anatomy: Anatomy, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Yield widths of the embedding, of attention and of the MLP that are not those of the config."""
    scopes = list(text_scopes(config))
    if anatomy.embedding is not None and not any(scope.get(key) for scope in scopes for key in _OTHER_WIDTHS):
        hidden, width = _values(config, ("hidden_size", "n_embd", "d_model")), shapes[anatomy.embedding][1]
        if hidden and width not in hidden:
            yield f"config.json says a hidden size of {_shown(hidden)}, the embedding has {width} columns"
    scope = next((each for each in reversed(scopes) if as_int(each.get("num_attention_heads"))), None)
    if scope is None or anatomy.main is None:
        return
    for suffix, width, what in _expected_rows(scope):
        rows = {shapes[name][0] for i in range(anatomy.n_layers) if (name := f"{anatomy.main}.{i}.{suffix}") in shapes}
        # in some classes a part of the layers has another width
        if rows and width not in rows:
            yield f"config.json says {what}, {suffix} has {min(rows)} rows"


def _expected_rows(scope: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Yield names in a layer, the rows that the config gives them, and how it says so."""
    heads, shared = as_int(scope.get("num_attention_heads")) or 1, as_int(scope.get("num_key_value_heads"))
    hidden, head_dim = as_int(scope.get("hidden_size")), as_int(scope.get("head_dim"))
    width = head_dim or (hidden // heads if hidden else None)
    if width is not None:
        yield "self_attn.q_proj.weight", heads * width, f"{heads} attention heads of width {width}"
        if shared is not None:
            yield "self_attn.k_proj.weight", shared * width, f"{shared} key-value heads of width {width}"
    inner = as_int(scope.get("intermediate_size"))
    if inner is not None:
        yield "mlp.up_proj.weight", inner, f"an intermediate size of {inner}"


def _values(config: Mapping[str, Any], keys: tuple[str, ...]) -> list[int]:
    """Return the whole numbers under any of the keys; lists and mappings under such names have other meanings."""
    values = (as_int(scope.get(key)) for scope in text_scopes(config) for key in keys)
    return [value for value in values if value is not None]


def _shown(values: list[int]) -> str:
    return ", ".join(dict.fromkeys(brief(value) for value in values))
