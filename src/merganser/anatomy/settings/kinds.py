"""Kinds of layers that a config describes by a rule (every 6th, the first k) instead of a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .config import as_int, words

__all__ = ["dense_layers", "fit_period", "has_window", "implied_lists", "last_kind", "stale_rules", "underived"]


class _Every(NamedTuple):
    """Layers with `index % period == at % period` are of the `chosen` kind; all others are of the kind `rest`."""

    period: int
    rest: str
    chosen: str = "full_attention"
    at: int = -1
    last: bool = False
    """Whether the last layer is of the `chosen` kind, too, whatever its index."""


# Families whose config class forces full attention in the last layer, whatever the list says.
_LAST_IS_FULL = words("diffusion_gemma_text embedding_gemma2_text gemma4_text gemma4_unified_text")

# Families whose config class alternates the kinds itself, with the period that it uses if no key gives one.
_ALTERNATING: dict[str, _Every] = {
    **dict.fromkeys(words("gemma2 gpt_oss t5_gemma_module vaultgemma"), _Every(2, "sliding_attention")),
    **dict.fromkeys(words("ultrabert"), _Every(3, "sliding_attention")),
    **dict.fromkeys(words("afmoe cohere2 exaone4 exaone_moe olmo3"), _Every(4, "sliding_attention")),
    **dict.fromkeys(words("gemma3n_text kolibri1"), _Every(5, "sliding_attention")),
    **dict.fromkeys(words("gemma3_text t5gemma2_decoder t5gemma2_text"), _Every(6, "sliding_attention")),
    **dict.fromkeys((*_LAST_IS_FULL, "beam"), _Every(6, "sliding_attention", last=True)),
    **dict.fromkeys(words("cwm granite_swa granitemoe_swa"), _Every(4, "sliding_attention", at=0)),
    **dict.fromkeys(
        words("olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next"),
        _Every(4, "linear_attention"),
    ),
    "bailing_hybrid": _Every(6, "linear_attention"),
    "inkling2_text": _Every(6, "hybrid_sliding", "hybrid"),
    "minimax": _Every(2, "linear_attention", at=0),
    "modernbert": _Every(3, "sliding_attention", at=0),
    "modernbert-decoder": _Every(3, "sliding_attention", at=0),
    "qwen4_exp_text": _Every(4, "linear_attention", "indexed_attention"),
}
_PERIOD_KEYS = {
    "sliding_window_pattern": "sliding_attention",
    "_sliding_window_pattern": "sliding_attention",
    "global_attn_every_n_layers": "sliding_attention",
    "full_attention_interval": "linear_attention",
    "layer_group_size": "linear_attention",
}

# Families whose config class makes the first layers dense and gives the others experts, with the number of dense
# layers to use if `first_k_dense_replace` is absent.
_DENSE_FIRST: dict[str, int] = {
    **dict.fromkeys(
        words(
            """axk1 axk2 dots3_note_text ernie4_5_vl_moe_text glm4_moe_lite hy_v3 hy_v4 kimi_linear laguna
            mimo_v2_flash unlimited_ocr_text"""
        ),
        1,
    ),
    "bailing_hybrid": 2,
    "cohere2_moe": 0,
    **dict.fromkeys(words("beam deepseek_v32 glm5_next_text glm_moe_dsa mistral_large4_text"), 3),
}

# Lists that a config class derives from rules that this module does not implement.
_DERIVED_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "cohere2_moe": ("layer_types",),
    "deepseek_v4": ("layer_types", "mlp_layer_types"),
    "dots3_note_text": ("layer_types", "per_layer_config"),
    "dots3_note_vision_encoder": ("mlp_layer_types", "per_layer_config"),
    "flint": ("layer_types",),
    "gemma3n_text": ("activation_sparsity_pattern",),
    "glm5_next_text": ("layer_types", "indexer_types"),
    "glm_moe_dsa": ("indexer_types",),
    "hy_v4": ("indexer_types",),
    "inkling_text": ("layer_types", "mlp_layer_types"),
    "kimi_linear": ("layer_types",),
    "lfm3": ("layer_types",),
    "lfm3_vl_vision": ("layer_types",),
    "mimo_v2_flash": ("layer_types",),
    "mistral_large4_text": ("no_rope_layers", "indexer_types"),
    "moonshine_streaming_encoder": ("sliding_windows",),
    "muse_glimmer_text": ("layer_types", "layer_rope_theta"),
    "muse_glimmer_vision": ("layer_types",),
    "muse_spark_text": ("layer_types", "layer_rope_theta"),
    "muse_spark_vision": ("layer_types",),
    "neomme": ("layer_types", "per_layer_config"),
    "reformer": ("attn_layers",),
    "sapiens2": ("num_key_value_heads_per_layer",),
    "step3p5": ("layer_types", "mlp_layer_types"),
    "zamba": ("layers_block_type",),
    "zamba2": ("layers_block_type",),
}


def underived(scope: Mapping[str, Any]) -> list[str]:
    """Return the keys of per-layer lists that `scope` omits and its config class derives.

    Only lists whose rule `implied_lists` does not implement are returned.
    """
    return [key for key in _DERIVED_ELSEWHERE.get(str(scope.get("model_type")), ()) if not scope.get(key)]


def last_kind(scope: Mapping[str, Any]) -> str | None:
    """Return the kind that the last layer must have; None if it may have any."""
    return "full_attention" if str(scope.get("model_type")) in _LAST_IS_FULL else None


def implied_lists(scope: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    """Return the per-layer lists that transformers derives for `count` layers from the rules in `scope`.

    Lists that `scope` already has are not compared.
    """
    lists: dict[str, list[Any]] = {}
    kind = str(scope.get("model_type"))
    if types := _alternating(scope, count) or _windowed(scope, count):
        lists["layer_types"] = types
    if kind in _DENSE_FIRST:
        dense = dense_layers(scope, range(count), _DENSE_FIRST[kind])
        lists["mlp_layer_types"] = ["dense" if flag else "sparse" for flag in dense]
    if kind in ("llama4_text", "smollm3"):
        interval = as_int(scope.get("no_rope_layer_interval")) or 4
        lists["no_rope_layers"] = [int((index + 1) % interval != 0) for index in range(count)]
    if kind == "llama4_text":
        step = as_int(scope.get("interleave_moe_layer_step")) or 1
        lists["moe_layers"] = list(range(step - 1, count, step))
    for key in ("block_types", "_block_types"):
        pattern = scope.get(key)
        if isinstance(pattern, list) and pattern:
            lists[key] = [pattern[index % len(pattern)] for index in range(count)]
    return lists


def _alternating(scope: Mapping[str, Any], count: int) -> list[str] | None:
    rule = _ALTERNATING.get(str(scope.get("model_type")))
    for key, rest in _PERIOD_KEYS.items():
        if period := as_int(scope.get(key)):
            rule = _Every(period, rest) if rule is None else rule._replace(period=period)
    if rule is None:
        return None
    chosen = [index % rule.period == rule.at % rule.period for index in range(count)]
    if rule.last:
        chosen[-1] = True
    return [rule.chosen if flag else rule.rest for flag in chosen]


def _windowed(scope: Mapping[str, Any], count: int) -> list[str] | None:
    """Return the kinds of Qwen's layers: full attention in the first `max_window_layers`, then a sliding window."""
    first = as_int(scope.get("max_window_layers"))
    if first is None or not has_window(scope):
        return None
    return ["sliding_attention" if index >= first else "full_attention" for index in range(count)]


def has_window(scope: Mapping[str, Any]) -> bool:
    """Return whether the layers after the first `max_window_layers` attend to a sliding window only."""
    # dots1 has no flag for it
    switched = scope.get("use_sliding_window", scope.get("model_type") == "dots1")
    return bool(switched) and scope.get("sliding_window") is not None


def dense_layers(scope: Mapping[str, Any], layers: Sequence[int], default: int = 0) -> list[bool]:
    """Return which of these layers are dense: the first k, and those to which `moe_layer_freq` gives no experts.

    Args:
        scope: The config.
        layers: Indices of layers.
        default: k if `first_k_dense_replace` is absent.
    """
    first = as_int(scope.get("first_k_dense_replace"))
    freq = scope.get("moe_layer_freq")
    k = default if first is None else first
    if isinstance(freq, list) and len(freq) > max(layers, default=0):
        return [index < k or not freq[index] for index in layers]
    return [index < k or index % (as_int(freq) or 1) != 0 for index in layers]


def fit_period(flags: Sequence[bool], period: int, offset: int) -> tuple[int, int] | None:
    """Return `(period, offset)` with `flags[i] == (i % period == offset)`, preferably the given pair, else None.

    If no flag is set, the offset is an index after the last layer.
    """
    periods = [period, *range(1, len(flags) + 2)]
    for candidate in periods:
        for start in (offset, *range(candidate)):
            if start < candidate and all(flag == (i % candidate == start) for i, flag in enumerate(flags)):
                return candidate, start
    return None


def stale_rules(scope: Mapping[str, Any], count: int) -> list[str]:
    """Return a message for each rule in `scope` that contradicts its `layer_types`."""
    implied = implied_lists(scope, count).get("layer_types")
    if implied is None or scope.get("layer_types") == implied:
        return []
    return [
        f"{key}={scope[key]} does not describe the chosen layers; layer_types does, so load it with a transformers "
        "version that reads layer_types"
        for key in (*_PERIOD_KEYS, "max_window_layers")
        if scope.get(key) and not key.startswith("_")
    ]
