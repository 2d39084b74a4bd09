"""Which config settings change what the model computes, and how two configs differ in them.

Tensors of equal shapes may have different meanings: with another number of heads, another activation, or a norm that
multiplies by 1 + w, the same numbers compute another function.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .config import COUNT_KEYS, as_int
from .defaults import NEUTRAL, class_defaults, is_known_type, same_code
from .effects import Kind, kind_of
from .kinds import implied_lists

__all__ = ["Difference", "differences", "settings"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting in which two configs differ.

    Attributes:
        key: The setting, prefixed with its sub-config: "rope_theta", "vision_config.patch_size".
        kind: What the setting changes; see `Kind`.
        first: Its value in the first config, else the default of the config class; None if neither is known.
        second: Its value in the second config.
    """

    key: str
    kind: Kind
    first: Any
    second: Any


_LABELS = re.compile(r"label_\d+", re.IGNORECASE)

# Equivalent names of activations; the tanh approximation differs from exact GELU by at most 0.0005.
_ACTIVATIONS = {
    "swish": "silu",
    "gelu_python": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu (tanh)"),
}
_GELUS = ("gelu", "gelu (tanh)")
_ALIASES = {
    "rotary_emb_base": "rope_theta",
    "rotary_embedding_base": "rope_theta",
    "global_rope_theta": "rope_theta",
    "local_rope_theta": "rope_local_base_freq",
    "rotary_pct": "partial_rotary_factor",
    "sliding_window_size": "sliding_window",
    "n_ctx": "n_positions",
    "max_sequence_length": "max_position_embeddings",
}
"""Other names that some classes use for a setting. If a config has both names, the second one takes precedence."""

_TEXT = ("text_config", "llm_config", "language_config", "text", "llm", "language_model")
_MOST_DEPTH = 6


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Return the settings that change what the model computes and that differ between two configs.

    If a config lacks a setting, its class's default is compared, if that is known.

    Args:
        first: The contents of a config.json.
        second: The contents of another.
    """
    if first == second or not first or not second:
        return []
    ours, theirs = settings(first), settings(second)
    differing = []
    lonely = {key.rpartition(".")[0] for key in ours} ^ {key.rpartition(".")[0] for key in theirs}
    for tower in sorted(lonely):
        said = "given" if any(key.startswith(f"{tower}.") for key in ours) else None
        differing.append(Difference(tower, "unknown", said, None if said else "given"))
    for key in dict.fromkeys([*ours, *theirs]):
        if key.rpartition(".")[0] in lonely:
            continue
        a, b = ours.get(key), theirs.get(key)
        kind = _kind_between(key, a, b)
        if kind is not None and not _same(key, a, b):
            # the class's default for the absent setting is unknown
            unsaid = kind == "meaning" and (a is None or b is None)
            differing.append(Difference(key, "unknown" if unsaid else kind, a, b))
    return differing


def _same(key: str, first: object, second: object) -> bool:
    """Return whether two values are the same setting; an absent value equals one that has no effect.

    Lists of different lengths count as the same: they belong to different numbers of layers, which the tensors show.
    """
    if isinstance(first, list) and isinstance(second, list) and len(first) != len(second):
        return True
    if first is None or second is None:
        other = second if first is None else first
        nothing = NEUTRAL.get(key.rpartition(".")[2])
        return other is None or other is False or other in ([], {}, "") or other == nothing
    return bool(first == second)


def _kind_between(key: str, first: Any, second: Any) -> Kind | None:
    last = key.rpartition(".")[2]
    if last == "model_type":
        if not first or not second or same_code(first, second):
            return None
        return "meaning" if is_known_type(first) and is_known_type(second) else "unknown"
    kind = kind_of(last)
    if last == "id2label" and isinstance(first, dict) and isinstance(second, dict):
        return "meaning" if _permuted(first, second) else kind
    both_gelu = first in _GELUS and second in _GELUS
    return "behaviour" if both_gelu else kind


def _permuted(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Return whether a label that both mappings contain has different numbers in them."""
    place = {label: number for number, label in first.items()}
    return any(place.get(label, number) != number for number, label in second.items())


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config that may change what the model computes, each under one canonical name.

    Sub-configs of the language model are merged with the config around them, since older and newer files of one class
    split them differently; sub-configs of towers keep their name as a prefix. RoPE settings are written in one form,
    and known class defaults are filled in.
    """
    collected: dict[str, Any] = {}
    for prefix, scope in _scopes(config, "", _MOST_DEPTH):
        for key, value in _canonical(scope).items():
            collected[prefix + key] = value
    return collected


def _scopes(config: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the text config, merged with the config around it, and the sub-configs of towers, each with its prefix."""
    scope: dict[str, Any] = {}
    inner: list[tuple[str, Mapping[str, Any]]] = []
    nested: Mapping[str, Any] | None = config
    for _ in range(depth):
        if nested is None:
            break
        text = None
        for key, value in nested.items():
            if not isinstance(value, dict) or not _is_config(key):
                scope[key] = value
            elif key in _TEXT and text is None:
                text = value
            else:
                inner.append((key, value))
        nested = text
    yield prefix, scope
    for key, value in inner if depth else ():
        yield from _scopes(value, f"{prefix}{key}.", depth - 1)


def _is_config(key: str) -> bool:
    return kind_of(key) is not None and "rope" not in key and "label" not in key


def _canonical(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one scope with canonical names, spellings and defaults."""
    given = {_ALIASES.get(key, key): value for key, value in scope.items() if _ALIASES.get(key, key) not in scope}
    raw = {**class_defaults(scope.get("model_type")), **given, **scope}
    if raw.get("hidden_activation") is not None:
        # Gemma's classes give this key precedence
        raw["hidden_act"] = raw["hidden_activation"]
    raw |= _rope(raw)
    raw |= _derived(raw, scope)
    canonical: dict[str, Any] = {}
    for key, value in raw.items():
        if key == "model_type":
            if isinstance(value, str):
                canonical[key] = value
        elif key not in _ALIASES and key != "hidden_activation" and kind_of(key) is not None:
            canonical[key] = _value(key, value)
    return canonical


def _value(key: str, value: Any) -> Any:
    if key == "id2label":
        return _labels(value)
    if isinstance(value, str) and kind_of(key) == "meaning":
        return _ACTIVATIONS.get(value.lower(), value)
    return value


def _labels(value: Any) -> dict[str, str] | None:
    """Return the labels by number; None if they are the placeholders that transformers generates."""
    if not isinstance(value, dict):
        return None
    labels = {number: str(label).casefold() for number, label in value.items()}
    return None if all(_LABELS.fullmatch(label) for label in labels.values()) else labels


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE settings in the form of older files: a base, a scaling, and a base for sliding windows."""
    given = raw.get("rope_parameters")
    newer = isinstance(given, dict)
    parameters = dict(given) if isinstance(given, dict) else {}
    sliding = parameters.pop("sliding_attention", None)
    full = parameters.pop("full_attention", None)
    parameters |= full if isinstance(full, dict) else {}
    older = raw.get("rope_scaling")
    scaling = dict(older) if isinstance(older, dict) and not parameters else parameters
    rope: dict[str, Any] = {"rope_parameters": None}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in scaling:
            rope[key] = scaling.pop(key)
    if isinstance(sliding, dict) and "rope_theta" in sliding:
        rope["rope_local_base_freq"] = sliding["rope_theta"]
    kind = scaling.pop("rope_type", scaling.pop("type", None))
    scaling.pop("type", None)
    if kind not in (None, "default", "mrope"):
        scaling["rope_type"] = kind
    if newer or older is not None:
        rope["rope_scaling"] = scaling or None
    both = {**raw, **rope}
    if both.get("rope_local_base_freq") == both.get("rope_theta"):
        rope["rope_local_base_freq"] = None
    return rope


def _derived(raw: Mapping[str, Any], scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that are absent and follow from others."""
    derived: dict[str, Any] = {}
    heads, hidden = as_int(raw.get("num_attention_heads")), as_int(raw.get("hidden_size"))
    if heads:
        if raw.get("num_key_value_heads") is None:
            derived["num_key_value_heads"] = heads
        if raw.get("qk_rope_head_dim") is not None:
            # multi-head latent attention has several head widths, under other keys
            derived["head_dim"] = None
        elif hidden and raw.get("head_dim") is None:
            derived["head_dim"] = hidden // heads
    if not raw.get("use_sliding_window", True):
        # Qwen's configs keep the window size even if the window is off
        derived |= {"sliding_window": None, "max_window_layers": None}
    counts = [as_int(scope.get(key)) for key in COUNT_KEYS]
    count = next((count for count in counts if count is not None and 0 < count <= 10_000), None)
    if count is not None:
        implied = implied_lists({**raw, **derived}, count)
        derived |= {key: value for key, value in implied.items() if raw.get(key) is None}
        types = derived.get("layer_types", raw.get("layer_types"))
        if isinstance(types, list) and set(map(str, types)) == {"full_attention"}:
            derived["layer_types"] = None
    return derived
