"""The config of a checkpoint whose layers are chosen from another's."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .config import COUNT_KEYS, as_int, text_scopes, words
from .infer import Anatomy
from .kinds import implied_lists, refit_rules, stale_rules

__all__ = ["SlicedConfig", "slice_config"]


@dataclass(frozen=True, slots=True)
class SlicedConfig:
    """A config and what it could not express.

    Attributes:
        config: The new contents of config.json.
        warnings: One message per setting that does not describe the chosen layers.
    """

    config: dict[str, Any]
    warnings: list[str]


# Lists of layer indices, as opposed to lists with a value for each layer.
_INDICES = re.compile(
    r"(attn|attention|layers?|blocks?|moe|mlp|hybrid)_(layer_)?(idxs?|ids|indices|indexes)$|_only_layers$"
    r"|^moe_layers$|^cross_attention_layers$|^(sparse|dense|global|full|linear)_(attn_|attention_)?layers$"
)
# Lists that are never per layer, whatever their length.
_NOT_PER_LAYER = re.compile(
    r"token|^architectures$|(?<!layer)_ids$|lang|label|time_step|image|patch|multiplier|conv_|kernel|words|mrope|task"
)
# Rules by position that nothing here knows how to carry over.
_UNKNOWN_RULE = re.compile(
    r"(layer|block|moe|attn|attention|sparse|sliding|cross|rope|dense).*(period|interval|every|freq|step)"
    r"|(every|period|interval|freq).*(layer|block)|kv_shared_layers|source_layers"
)
_KNOWN_RULES = words(
    """attn_layer_period expert_layer_period full_attention_interval no_rope_layer_interval interleave_moe_layer_step
    moe_layer_freq decoder_sparse_step global_attn_every_n_layers"""
)


def slice_config(config: Mapping[str, Any], layers: Sequence[int], *, anatomy: Anatomy) -> SlicedConfig:
    """Return the config of a checkpoint made of these layers of this one, in this order.

    The layer count is set under every key that held it, lists with one entry per layer are re-indexed, lists of layer
    indices are remapped. Where transformers derives the kinds of the layers from a rule that no longer holds, the rule
    is refitted or the list is written out.

    Args:
        config: The contents of config.json of the checkpoint that `anatomy` describes.
        layers: For each layer of the result, the index of the layer that it comes from; repeats are allowed.
        anatomy: The structure of that checkpoint.

    Raises:
        UnsupportedError: The checkpoint has no single stack of layers, or prediction layers behind it.
        CheckpointError: The config contradicts the file on the number of layers.
        ValueError: `layers` is empty or names a layer that is not there.
    """
    count = anatomy.n_layers
    _check(layers, anatomy)
    result = copy.deepcopy(dict(config))
    if list(layers) == list(range(count)):
        return SlicedConfig(result, [])
    if any(part.stack == anatomy.main and part.layer is None for part in anatomy.parts.values()):
        raise UnsupportedError(
            "config.json: num_nextn_predict_layers: the file has prediction layers behind its last layer, "
            "and choosing layers of such a checkpoint is not supported"
        )
    named = [(scope, key) for scope in text_scopes(result) for key in COUNT_KEYS if as_int(scope.get(key)) is not None]
    scopes = [scope for scope, key in named if scope[key] == count]
    warnings: list[str] = []
    if not named:
        result["num_hidden_layers"] = count
        scopes = [result]
        warnings.append("config.json names no number of layers; num_hidden_layers is added")
    elif not scopes:
        found = ", ".join(f"{key}={scope[key]}" for scope, key in named)
        raise CheckpointError(f"config.json: the file has {count} layers, the config says {found}")
    for scope in {id(scope): scope for scope in scopes}.values():
        warnings += _slice_scope(scope, layers, count)
    return SlicedConfig(result, [*warnings, *_first_layer_only(layers, anatomy)])


def _check(layers: Sequence[int], anatomy: Anatomy) -> None:
    if anatomy.main is None:
        found = ", ".join(anatomy.stacks) or "none"
        raise UnsupportedError(f"choosing layers needs a checkpoint with one main stack of layers; found {found}")
    if not layers:
        raise ValueError("layers: none chosen; at least one is needed")
    if wrong := [index for index in layers if not 0 <= index < anatomy.n_layers]:
        raise ValueError(f"layers: no layer {wrong[0]} in {anatomy.main}, which has 0 to {anatomy.n_layers - 1}")


def _slice_scope(scope: dict[str, Any], layers: Sequence[int], count: int) -> list[str]:
    for key, values in implied_lists(scope, count).items():
        pattern = key.endswith("block_types")
        if not scope.get(key) or (pattern and len(scope[key]) != count):
            scope[key] = values
    written = implied_lists(scope, count)
    warnings = refit_rules(scope, layers)
    for key in COUNT_KEYS:
        if as_int(scope.get(key)) == count:
            scope[key] = len(layers)
    for key, value in list(scope.items()):
        scope[key] = _slice_value(key, value, layers, count)
        unknown = key not in _KNOWN_RULES and key not in written and _UNKNOWN_RULE.search(key)
        if unknown and (as_int(value) or 0) > (0 if "shared" in key else 1):
            warnings.append(f"{key}={value} depends on the position of layers and is left as it is")
    return [*warnings, *stale_rules(scope, len(layers))]


def _slice_value(key: str, value: Any, layers: Sequence[int], count: int) -> Any:
    if isinstance(value, str):
        # Nemotron-H: one letter per layer.
        per_layer = key.endswith("override_pattern") and len(value) == count
        return "".join(value[index] for index in layers) if per_layer else value
    if not isinstance(value, list):
        return value
    if key == "attention_types" and (kinds := _expand(value)) and len(kinds) == count:
        return [[[kinds[index] for index in layers], 1]]
    if _INDICES.search(key) and all(as_int(item) is not None for item in value):
        chosen = set(value)
        return [position for position, index in enumerate(layers) if index in chosen]
    if len(value) == count and not _NOT_PER_LAYER.search(key):
        return [copy.deepcopy(value[index]) for index in layers]
    return value


def _expand(attention_types: list[Any]) -> list[Any] | None:
    """GPT-Neo: `[[["global", "local"], 12]]` is 24 layers."""
    kinds: list[Any] = []
    for entry in attention_types:
        match entry:
            case [list() as group, int() as repeats]:
                kinds += group * repeats
            case _:
                return None
    return kinds


def _first_layer_only(layers: Sequence[int], anatomy: Anatomy) -> list[str]:
    """RWKV's first layer has one norm more, ModernBERT's one less, and their classes expect it at index 0."""
    norms: dict[int, set[str]] = {index: set() for index in range(anatomy.n_layers)}
    for part in anatomy.parts.values():
        if part.stack == anatomy.main and part.role == "norm" and part.layer is not None:
            norms[part.layer].add(anatomy.rename_layer(part.name, 0))
    rest = [norms[index] for index in range(1, anatomy.n_layers)]
    if not rest or any(other != rest[0] for other in rest) or norms[0] == rest[0]:
        return []
    if layers[0] == 0 and 0 not in layers[1:]:
        return []
    return ["layer 0 has other norms than the rest, so it must stay first and alone for the result to load"]
