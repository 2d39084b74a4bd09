"""Config values that name layers, or hold one entry per layer, rewritten for a new choice of layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from ...errors import UnsupportedError
from .config import as_int, words

__all__ = ["is_by_layer", "slice_value"]

# Lists of layer indices: the layers that have some feature, as opposed to lists with one value per layer.
_MEMBERS = re.compile(
    r"(attn|attention|layers?|blocks?|moe|mlp|hybrid)_(layer_)?(idxs?|ids|indices|indexes)$|_only_layers$"
    r"|^moe_layers$|^cross_attention_layers$|^(sparse|dense|global|full|linear)_(attn_|attention_)?layers$"
    r"|^fullatt_block_indexes$|^global_attention_blocks$|^global_attn_indexes$|^look_(ahead|backward)_layers$"
    r"|^rope_scaling_layers$|^subsample_layers$"
)
# Lists with one value per layer. Other lists of that length are treated as such lists, too.
_PER_LAYER = frozenset(
    words(
        """activation_sparsity_pattern attention_layers attention_types attention_window attention_windows attn_layers
        block_configs block_types compress_ratios indexer_types intermediate_size layer_rope_theta layer_types
        layers_block_type mlp_layer_types moe_layer_freq no_rope_layers num_attention_heads_per_layer
        num_key_value_heads_per_layer sliding_windows swiglu_limits swiglu_limits_shared"""
    )
)
# Layers whose output is read elsewhere in the model: each must be in the result exactly once.
_READ = frozenset(
    words(
        """backbone_out_indices cat_hidden_layers conditional_layer deepstack_visual_indexes eval_idx extract_layers
        feature_layer insert_layer_id intermediate_hidden_state_indices intermediate_hook_ids intermediate_layers_indices merge_index
        spatial_target_layers"""
    )
)
# The same, counted from 1: 0 is the input of the first layer.
_READ_FROM_ONE = frozenset(("out_indices", "_out_indices"))
_STAGES = frozenset(("out_features", "_out_features"))
# Lists over prediction layers or over layers of another model, and values that `refit` has rewritten already.
_NOT_THESE_LAYERS = frozenset(
    words(
        """kv_source_layers mtp_layer_types mtp_layers_block_type mtp_local_layer_ids mtp_mlp_layer_types ple_layer_ids
        target_layer_ids"""
    )
)
# Lists that never hold one value per layer, whatever their length.
_NOT_PER_LAYER = re.compile(
    r"token|^architectures$|(?<!layer)_ids$|lang|label|time_step|image|patch|multiplier|conv_|kernel|words|mrope|task"
    r"|^summary_idxs$"
)
# Nested dicts that hold such lists. Their indices count from 1.
_NESTED = frozenset(("linear_attn_config", "sparse_attention_config"))
_NESTED_MEMBERS_FROM_ONE = frozenset(("full_attn_layers", "kda_layers"))
# Strings with one letter per layer, and strings that list layers.
_LETTERS = re.compile(r"override_pattern$|^index_topk_pattern$")
_WRITTEN_MEMBERS = frozenset(("moe_layers_enum",))


def is_by_layer(key: str) -> bool:
    """Return whether a key is known to name layers, or is a known exception that only looks as if it did."""
    known = (
        _PER_LAYER,
        _READ,
        _READ_FROM_ONE,
        _STAGES,
        _NOT_THESE_LAYERS,
        _NESTED,
        _WRITTEN_MEMBERS,
        {"per_layer_config", "stage_names"},
    )
    return any(key in keys for keys in known) or bool(_MEMBERS.search(key) or _LETTERS.search(key))


def slice_value(key: str, value: Any, layers: Sequence[int], count: int, predictions: int = 0) -> Any:
    """Return the value of `key` for the chosen layers; values that do not depend on layers are returned unchanged.

    Args:
        key: The key.
        value: Its value for the old layers.
        layers: For each new layer, the index of the old layer that it comes from.
        count: Number of old layers.
        predictions: Number of prediction layers after the last layer, which lists may also cover. They are kept.

    Raises:
        UnsupportedError: The model reads the output of a layer that the result lacks, or has several times.
    """
    if key in _NOT_THESE_LAYERS:
        return value
    if key in _READ or key in _READ_FROM_ONE or key in _STAGES or key == "stage_names":
        return _slice_read(key, value, layers, count)
    if isinstance(value, str):
        return _slice_text(key, value, layers, count)
    if isinstance(value, dict):
        return _slice_dict(key, value, layers, count)
    if not isinstance(value, list):
        return value
    if key == "attention_types" and (kinds := _expand(value, count)):
        return [[[kinds[index] for index in layers], 1]]
    if _MEMBERS.search(key) and all(as_int(item) is not None for item in value):
        return _members(value, layers)
    longer = key in _PER_LAYER and predictions > 0 and len(value) == count + predictions
    if longer or (len(value) == count and not _NOT_PER_LAYER.search(key)):
        return [copy.deepcopy(value[index]) for index in layers] + value[count:]
    return value


def _members(value: Sequence[Any], layers: Sequence[int], start: int = 0) -> list[int]:
    chosen = {item for item in value if as_int(item) is not None}
    return [position + start for position, index in enumerate(layers) if index + start in chosen]


def _slice_text(key: str, value: str, layers: Sequence[int], count: int) -> str:
    if key in _WRITTEN_MEMBERS:
        members = [int(word) for word in value.split(",") if word.strip().isdecimal()]
        return ",".join(map(str, _members(members, layers)))
    # Nemotron-H: one letter per layer.
    per_layer = _LETTERS.search(key) and len(value) == count
    return "".join(value[index] for index in layers) if per_layer else value


def _slice_dict(key: str, value: dict[str, Any], layers: Sequence[int], count: int) -> dict[str, Any]:
    if key == "per_layer_config":
        by_index = {int(index): settings for index, settings in value.items() if str(index).isdecimal()}
        width = len(str(len(layers) - 1))
        return {
            f"{position:0{width}d}": copy.deepcopy(by_index[index])
            for position, index in enumerate(layers)
            if index in by_index
        }
    if key not in _NESTED:
        return value
    return {
        name: _members(entry, layers, 1)
        if name in _NESTED_MEMBERS_FROM_ONE and isinstance(entry, list)
        else slice_value(name, entry, layers, count)
        for name, entry in value.items()
    }


def _slice_read(key: str, value: Any, layers: Sequence[int], count: int) -> Any:
    """Rewrite indices of layers whose output is read; an index of the last layer still means the last layer."""
    if key == "stage_names":
        stages = ["stem", *(f"stage{index + 1}" for index in range(count))]
        return [*stages[:1], *(f"stage{index + 1}" for index in range(len(layers)))] if value == stages else value
    if key in _STAGES:
        if not isinstance(value, list):
            return value
        numbers = [int(name[5:]) if re.fullmatch(r"stage[0-9]+", str(name)) else 0 for name in value]
        return [
            f"stage{_new_number(key, n, layers, count)}" if n else name for n, name in zip(numbers, value, strict=True)
        ]
    start = int(key in _READ_FROM_ONE)
    if isinstance(value, list):
        return [_new_number(key, item, layers, count, start) for item in value]
    return _new_number(key, value, layers, count, start)


def _new_number(key: str, number: object, layers: Sequence[int], count: int, start: int = 1) -> object:
    index = as_int(number)
    # indices from the end, and the index of the first layer's input, do not change
    if index is None or not start <= index < count + start:
        return number
    if index - start == count - 1:
        return len(layers) - 1 + start
    positions = [position for position, old in enumerate(layers) if old == index - start]
    if len(positions) != 1:
        raise UnsupportedError(
            f"config.json: {key} reads the output of layer {index - start}, which is chosen {len(positions)} times; "
            "it must be there once"
        )
    return positions[0] + start


def _expand(attention_types: list[Any], count: int) -> list[Any]:
    """Expand GPT-Neo's `[[["global", "local"], 12]]` to one kind per layer; empty if that is not `count` layers."""
    kinds: list[Any] = []
    for entry in attention_types:
        match entry:
            case [list() as group, int() as repeats] if len(group) * repeats <= count:
                kinds += group * repeats
            case _:
                return []
    return kinds if len(kinds) == count else []
