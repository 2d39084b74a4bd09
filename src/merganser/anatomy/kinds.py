"""Kinds of layers that a config describes by a rule (every 6th, the first k) instead of a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .config import as_int

__all__ = ["fit_period", "implied_lists", "refit_rules", "stale_rules"]

# Families whose config class alternates the kinds by itself: period when no key gives one, and the kind of all layers
# but every period-th, which is full attention.
_ALTERNATING: dict[str, tuple[int, str]] = {
    "cohere2": (4, "sliding_attention"),
    "exaone4": (4, "sliding_attention"),
    "gemma2": (2, "sliding_attention"),
    "gemma3_text": (6, "sliding_attention"),
    "gemma3n_text": (5, "sliding_attention"),
    "gpt_oss": (2, "sliding_attention"),
    "olmo3": (4, "sliding_attention"),
    "qwen3_5_moe_text": (4, "linear_attention"),
    "qwen3_5_text": (4, "linear_attention"),
    "qwen3_next": (4, "linear_attention"),
    "vaultgemma": (2, "sliding_attention"),
}
_PERIOD_KEYS = {
    "sliding_window_pattern": "sliding_attention",
    "_sliding_window_pattern": "sliding_attention",
    "full_attention_interval": "linear_attention",
}


def implied_lists(scope: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    """Return the per-layer lists that transformers derives for `count` layers from the rules in `scope`.

    Lists that the scope spells out are not looked at.
    """
    lists: dict[str, list[Any]] = {}
    kind = scope.get("model_type")
    if types := _alternating(scope, count) or _windowed(scope, count):
        lists["layer_types"] = types
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
    kind = scope.get("model_type")
    if kind in ("modernbert", "modernbert-decoder"):
        period = as_int(scope.get("global_attn_every_n_layers")) or 3
        return ["sliding_attention" if index % period else "full_attention" for index in range(count)]
    period, other = _ALTERNATING.get(str(kind), (0, ""))
    for key, name in _PERIOD_KEYS.items():
        if given := as_int(scope.get(key)):
            period, other = given, other or name
    if not period:
        return None
    return [other if (index + 1) % period else "full_attention" for index in range(count)]


def _windowed(scope: Mapping[str, Any], count: int) -> list[str] | None:
    """Qwen: the first `max_window_layers` layers attend to everything, the rest slide."""
    first = as_int(scope.get("max_window_layers"))
    if first is None or not scope.get("use_sliding_window") or scope.get("sliding_window") is None:
        return None
    return ["sliding_attention" if index >= first else "full_attention" for index in range(count)]


def fit_period(flags: Sequence[bool], period: int, offset: int) -> tuple[int, int] | None:
    """Return `(period, offset)` with `flags[i] == (i % period == offset)`, nearest to the given pair; None without one.

    When no flag is set, an offset behind the last layer says so.
    """
    periods = [period, *range(1, len(flags) + 2)]
    for candidate in periods:
        for start in (offset, *range(candidate)):
            if start < candidate and all(flag == (i % candidate == start) for i, flag in enumerate(flags)):
                return candidate, start
    return None


def refit_rules(scope: dict[str, Any], layers: Sequence[int]) -> list[str]:
    """Rewrite the rules in `scope` so that they describe the layers that were kept, in their new order.

    Returns:
        A message for each rule that cannot describe them.
    """
    warnings = []
    if "layers_block_type" not in scope:
        for what in ("attn", "expert"):
            warnings += _refit_period(scope, layers, f"{what}_layer_period", f"{what}_layer_offset")
    _refit_sparse_step(scope, layers)
    warnings += _refit_first_dense(scope, layers)
    if scope.get("use_sliding_window") and (first := as_int(scope.get("max_window_layers"))) is not None:
        scope["max_window_layers"] = _leading([index < first for index in layers])
    return warnings


def _leading(flags: Sequence[bool]) -> int:
    return next((position for position, flag in enumerate(flags) if not flag), len(flags))


def _refit_period(scope: dict[str, Any], layers: Sequence[int], period_key: str, offset_key: str) -> list[str]:
    period = as_int(scope.get(period_key))
    if not period:
        return []
    offset = as_int(scope.get(offset_key)) or 0
    fitted = fit_period([index % period == offset for index in layers], period, offset)
    if fitted is None:
        return [f"{period_key}={period}, {offset_key}={offset}: no period and offset describe the chosen layers"]
    scope[period_key], scope[offset_key] = fitted
    return []


def _refit_sparse_step(scope: dict[str, Any], layers: Sequence[int]) -> None:
    """Qwen MoE: with step 1, `mlp_only_layers` can name any set of dense layers. It is remapped as an index list."""
    step = as_int(scope.get("decoder_sparse_step"))
    if step is None or step <= 1:
        return
    given = scope.get("mlp_only_layers")
    dense = {index for index in given if as_int(index) is not None} if isinstance(given, list) else set()
    scope["mlp_only_layers"] = sorted(dense | {index for index in range(max(layers) + 1) if (index + 1) % step})
    scope["decoder_sparse_step"] = 1


def _refit_first_dense(scope: dict[str, Any], layers: Sequence[int]) -> list[str]:
    """DeepSeek and its kin: the first k layers are dense, then every `moe_layer_freq`-th has experts."""
    first = as_int(scope.get("first_k_dense_replace"))
    if first is None:
        return []
    freq = as_int(scope.get("moe_layer_freq")) or 1
    dense = [index < first or index % freq != 0 for index in layers]
    for count in range(len(layers) + 1):
        if dense == [position < count or position % freq != 0 for position in range(len(layers))]:
            scope["first_k_dense_replace"] = count
            return []
    if "mlp_layer_types" in scope:
        scope["first_k_dense_replace"] = _leading(dense)
        return []
    return [f"first_k_dense_replace={first}: dense layers would follow layers with experts"]


def stale_rules(scope: Mapping[str, Any], count: int) -> list[str]:
    """Return a message for each rule in `scope` that contradicts the list beside it."""
    implied = implied_lists(scope, count).get("layer_types")
    if implied is None or scope.get("layer_types") == implied:
        return []
    keys = ("sliding_window_pattern", "full_attention_interval", "global_attn_every_n_layers", "max_window_layers")
    return [
        f"{key}={scope[key]} does not describe the chosen layers; layer_types does, so load it with a transformers "
        "version that reads layer_types"
        for key in keys
        if scope.get(key)
    ]
