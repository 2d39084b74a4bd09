"""Rewrite the positional rules of a config (every 6th, the first k) for a new choice of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UnsupportedError
from .config import as_int
from .kinds import dense_layers, fit_period, has_window, last_kind

__all__ = ["RULE_KEYS", "refit_rules"]

# Settings by which the model's code computes with a layer's index. 0 or False switches such a setting off.
_BY_NUMBER = {
    "encoder_sparse_step": "layers with experts are counted by number",
    "num_mem_blocks": "shared blocks alternate by layer number",
    "ple_layer_ids": "the rows of a table are given to layers by their number",
    "scale_attn_by_inverse_layer_idx": "attention is divided by the layer's number",
}
# Settings that make the size of tensors outside the layers depend on the number of layers.
_BY_COUNT = {
    "aligner_num_add_layers": "adapters are spread over the layers in a stack of their own",
    "cross_layer_interval": "cross-attention layers are spread over the layers in a stack of their own",
    "block_sizes": "layers are blocks of different lengths",
    "depths": "layers are stages of different widths",
    "hidden_size_per_layer_input": "a table outside the layers has columns for each layer",
    "num_block_repeats": "layers are stages of different widths",
    "use_weighted_layer_sum": "a tensor outside the layers has a weight for each layer",
}
# Settings for which 1 means off.
_HARMLESS_ONE = frozenset(("encoder_sparse_step", "num_mem_blocks"))

RULE_KEYS = frozenset(
    {
        *_BY_NUMBER,
        *_BY_COUNT,
        "_sliding_window_pattern",
        "attn_layer_offset",
        "attn_layer_period",
        "cross_attention_frequency",
        "decoder_sparse_step",
        "dense_mlp_idx",
        "expert_layer_offset",
        "expert_layer_period",
        "first_k_dense_replace",
        "full_attention_interval",
        "global_attn_every_n_layers",
        "interleave_moe_layer_step",
        "kv_source_layers",
        "layer_group_size",
        "max_window_layers",
        "mlp_only_layers",
        "moe_layer_end_index",
        "moe_layer_freq",
        "moe_layer_interval",
        "moe_layer_start_index",
        "n_layers_per_attn_res_block",
        "no_rope_layer_interval",
        "num_dense_layers",
        "num_first_full_attention_layers",
        "num_hash_layers",
        "num_kv_shared_layers",
        "num_last_full_attention_layers",
        "prefix_dense_sliding_window_pattern",
        "scale_depth",
        "sliding_window_pattern",
    }
)
"""Keys of rules that slicing rewrites, refuses, or replaces by an explicit list."""


def refit_rules(scope: dict[str, Any], layers: Sequence[int], count: int) -> None:
    """Rewrite the rules in `scope` so that they describe the chosen layers in their new order.

    Args:
        scope: The config, or the part of it that describes the layers; changed in place. Its lists must still be those
            of the old layers.
        layers: For each new layer, the index of the old layer that it comes from.
        count: Number of old layers.

    Raises:
        UnsupportedError: A rule, named in the message, cannot describe the chosen layers.
    """
    _refuse(scope, layers)
    if "layers_block_type" not in scope:
        for what in ("attn", "expert"):
            _refit_period(scope, layers, f"{what}_layer_period", f"{what}_layer_offset")
    _refit_fixed_period(scope, layers, "cross_attention_frequency")
    _refit_fixed_period(scope, layers, "n_layers_per_attn_res_block")
    _refit_sparse_step(scope, layers)
    _refit_first_dense(scope, layers, count)
    _refit_leading(scope, layers, "num_dense_layers", "dense layers")
    for key in ("dense_mlp_idx", "num_hash_layers"):
        if not scope.get("mlp_layer_types"):
            _refit_leading(scope, layers, key, "layers of the first kind")
    _refit_expert_range(scope, layers, count)
    _refit_shared_cache(scope, layers, count)
    types = scope.get("layer_types")
    if (kind := last_kind(scope)) and isinstance(types, list) and len(types) == count and types[layers[-1]] != kind:
        raise _inexpressible("layer_types", f"the last layer would be of another kind than {kind}, which it must have")
    if has_window(scope) and (first := as_int(scope.get("max_window_layers"))) is not None:
        scope["max_window_layers"] = _leading([index < first for index in layers])
    scale = scope.get("scale_depth")
    if isinstance(scale, (int, float)) and not isinstance(scale, bool):
        # MiniCPM multiplies residual branches by scale_depth / sqrt(layers); keep the factor of each layer
        scope["scale_depth"] = scale * math.sqrt(len(layers) / count)


def _refuse(scope: Mapping[str, Any], layers: Sequence[int]) -> None:
    for key, why in {**_BY_NUMBER, **_BY_COUNT}.items():
        value = scope.get(key)
        prefix = key in _BY_NUMBER and list(layers) == list(range(len(layers)))
        if value and not prefix and not (key in _HARMLESS_ONE and value == 1):
            raise _inexpressible(f"{key}={value}", why)


def _inexpressible(setting: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"config.json: {setting}: {why}, so no config describes the chosen layers; choose layers for which one does"
    )


def _leading(flags: Sequence[bool]) -> int:
    return next((position for position, flag in enumerate(flags) if not flag), len(flags))


def _refit_leading(scope: dict[str, Any], layers: Sequence[int], key: str, what: str) -> None:
    """Rewrite a key that counts the special layers at the start."""
    first = as_int(scope.get(key))
    if first is None:
        return
    flags = [index < first for index in layers]
    scope[key] = _leading(flags)
    if any(flags[scope[key] :]):
        raise _inexpressible(f"{key}={first}", f"{what} would follow others")


def _refit_period(scope: dict[str, Any], layers: Sequence[int], period_key: str, offset_key: str) -> None:
    period = as_int(scope.get(period_key))
    if not period:
        return
    offset = as_int(scope.get(offset_key)) or 0
    fitted = fit_period([index % period == offset for index in layers], period, offset)
    if fitted is None:
        raise _inexpressible(f"{period_key}={period}, {offset_key}={offset}", "the layers no longer alternate")
    scope[period_key], scope[offset_key] = fitted


def _refit_fixed_period(scope: dict[str, Any], layers: Sequence[int], key: str) -> None:
    """Rewrite a key by which every n-th layer, counted from the first, is special."""
    period = as_int(scope.get(key))
    if not period:
        return
    flags = [index % period == 0 for index in layers]
    for candidate in (period, *range(1, len(flags) + 1)):
        if flags == [index % candidate == 0 for index in range(len(flags))]:
            scope[key] = candidate
            return
    raise _inexpressible(f"{key}={period}", "the layers no longer alternate")


def _refit_sparse_step(scope: dict[str, Any], layers: Sequence[int]) -> None:
    """Rewrite Qwen MoE's step to 1, with the dense layers listed in `mlp_only_layers`, which is then remapped."""
    step = as_int(scope.get("decoder_sparse_step"))
    if step is None or step <= 1:
        return
    given = scope.get("mlp_only_layers")
    dense = {index for index in given if as_int(index) is not None} if isinstance(given, list) else set()
    scope["mlp_only_layers"] = sorted(dense | {index for index in range(max(layers) + 1) if (index + 1) % step})
    scope["decoder_sparse_step"] = 1


def _refit_first_dense(scope: dict[str, Any], layers: Sequence[int], count: int) -> None:
    """Rewrite DeepSeek's rule: the first k layers are dense, then every `moe_layer_freq`-th layer has experts."""
    first = as_int(scope.get("first_k_dense_replace"))
    if first is None:
        return
    freq = scope.get("moe_layer_freq")
    dense = dense_layers(scope, layers)
    if isinstance(freq, list) and len(freq) == count:
        # the list describes the remaining layers, and is re-indexed later
        scope["moe_layer_freq"] = [0 if index < first else flag for index, flag in enumerate(freq)]
        scope["first_k_dense_replace"] = 0
        return
    every = as_int(freq) or 1
    for leading in range(len(layers) + 1):
        if dense == [position < leading or position % every != 0 for position in range(len(layers))]:
            scope["first_k_dense_replace"] = leading
            return
    if not scope.get("mlp_layer_types"):
        raise _inexpressible(f"first_k_dense_replace={first}", "dense layers would follow layers with experts")
    scope["first_k_dense_replace"] = _leading(dense)


def _refit_expert_range(scope: dict[str, Any], layers: Sequence[int], count: int) -> None:
    """Rewrite ERNIE's rule: every n-th layer between a first and a last one has experts."""
    start = as_int(scope.get("moe_layer_start_index"))
    if start is None or scope.get("mlp_layer_types"):
        return
    end, step = as_int(scope.get("moe_layer_end_index")), as_int(scope.get("moe_layer_interval")) or 1
    last = count - 1 if end is None or end == -1 else end
    flags = [start <= index <= last and (index + 1) % step == 0 for index in layers]
    hits = [position for position, flag in enumerate(flags) if flag]
    # no layer has experts: use an empty range
    first, final = (hits[0], hits[-1]) if hits else (len(layers), len(layers) - 1)
    for candidate in (step, *range(1, len(layers) + 1)):
        if hits == [position for position in range(first, final + 1) if (position + 1) % candidate == 0]:
            # the old start index may precede the first layer with experts; the new one is exactly that layer
            scope["moe_layer_start_index"], scope["moe_layer_end_index"] = first, final
            scope["moe_layer_interval"] = candidate
            return
    raise _inexpressible(
        f"moe_layer_start_index={start}, moe_layer_interval={step}", "layers with experts no longer alternate"
    )


def _refit_shared_cache(scope: dict[str, Any], layers: Sequence[int], count: int) -> None:
    """Rewrite which layers reuse the keys and values of an earlier layer: the last k, or those in a list."""
    shared = as_int(scope.get("num_kv_shared_layers"))
    if shared:
        own = [index < count - shared for index in layers]
        scope["num_kv_shared_layers"] = len(layers) - _leading(own)
        if any(own[_leading(own) :]):
            raise _inexpressible(
                f"num_kv_shared_layers={shared}", "layers with keys of their own would follow those that share them"
            )
    sources = scope.get("kv_source_layers")
    if isinstance(sources, list) and len(sources) == count and all(as_int(item) is not None for item in sources):
        # each new value is the new index of the source layer; `slice_value` leaves this list as it is
        latest: dict[int, int] = {}
        remapped: list[int] = []
        for position, index in enumerate(layers):
            if sources[index] == index:
                latest[index] = position
            elif sources[index] not in latest:
                raise _inexpressible("kv_source_layers", f"layer {index} would lack layer {sources[index]}, its source")
            remapped.append(latest[sources[index]])
        scope["kv_source_layers"] = remapped
    types = scope.get("indexer_types")
    if isinstance(types, list) and len(types) == count and types[layers[0]] == "shared":
        raise _inexpressible("indexer_types", f"layer {layers[0]} would be first and share what no layer before it has")
