"""Make the config of a checkpoint whose layers are chosen from another checkpoint."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .infer import Anatomy
from .settings.by_layer import slice_value
from .settings.config import COUNT_KEYS, PREDICTION_KEYS, as_int, text_scopes
from .settings.kinds import implied_lists, stale_rules, underived
from .settings.refit import RULE_KEYS, refit_rules

__all__ = ["SlicedConfig", "slice_config"]


@dataclass(frozen=True, slots=True)
class SlicedConfig:
    """A config, and warnings about settings that could not be adapted.

    Attributes:
        config: The new contents of config.json.
        warnings: One message per setting that does not describe the chosen layers.
    """

    config: dict[str, Any]
    warnings: list[str]


# Positional rules that this module cannot adapt.
_UNKNOWN_RULE = re.compile(
    r"(layer|block|moe|attn|attention|sparse|sliding|cross|rope|dense).*(period|interval|every|freq|step)"
    r"|(every|period|interval|freq).*(layer|block)|kv_shared_layers|source_layers"
)


def slice_config(config: Mapping[str, Any], layers: Sequence[int], *, anatomy: Anatomy) -> SlicedConfig:
    """Return the config of a checkpoint that consists of these layers, in this order.

    The layer count is set under every key that held it, lists with one entry per layer are re-indexed, lists of layer
    indices are remapped. If transformers derives the kinds of layers from a rule that no longer holds, the rule is
    refitted, or the list is written out. Prediction layers stay after the last layer.

    Args:
        config: The contents of config.json of the checkpoint that `anatomy` describes.
        layers: For each layer of the result, the index of the layer that it comes from; repeats are allowed.
        anatomy: The structure of that checkpoint.

    Raises:
        UnsupportedError: The checkpoint has no single stack of layers, or a setting cannot describe the chosen layers.
        CheckpointError: The config and the tensors disagree on the number of layers.
        ValueError: `layers` is empty or contains an index that does not exist.
    """
    count = anatomy.n_layers
    _check(layers, anatomy)
    result = copy.deepcopy(dict(config))
    if list(layers) == list(range(count)):
        return SlicedConfig(result, [])
    named = [(scope, key) for scope in text_scopes(result) for key in COUNT_KEYS if as_int(scope.get(key)) is not None]
    scopes = [scope for scope, key in named if scope[key] == count]
    warnings: list[str] = []
    if not named:
        # some classes take the number of layers from the length of this list
        kinds = ((scope, scope.get("layers_block_type")) for scope in text_scopes(result))
        scopes = [scope for scope, counts in kinds if isinstance(counts, list) and len(counts) == count]
    if not named and not scopes:
        result["num_hidden_layers"] = count
        scopes = [result]
        warnings.append("config.json names no number of layers; num_hidden_layers is added")
    elif not scopes:
        counts = ", ".join(f"{key}={scope[key]}" for scope, key in named)
        raise CheckpointError(f"config.json: the file has {count} layers, the config says {counts}")
    for scope in {id(scope): scope for scope in scopes}.values():
        warnings += _slice_scope(scope, layers, count)
    _check_first_layer(layers, anatomy)
    return SlicedConfig(result, warnings)


def _check(layers: Sequence[int], anatomy: Anatomy) -> None:
    if anatomy.main is None:
        stacks = ", ".join(anatomy.stacks) or "none"
        raise UnsupportedError(f"choosing layers needs a checkpoint with one main stack of layers; found {stacks}")
    if not layers:
        raise ValueError("layers: none chosen; at least one is needed")
    if wrong := [index for index in layers if not 0 <= index < anatomy.n_layers]:
        raise ValueError(f"layers: no layer {wrong[0]} in {anatomy.main}, which has 0 to {anatomy.n_layers - 1}")


def _slice_scope(scope: dict[str, Any], layers: Sequence[int], count: int) -> list[str]:
    if missing := underived(scope):
        raise UnsupportedError(
            f"config.json: {', '.join(missing)} of model_type {scope['model_type']} is absent, and its config class "
            "derives it by a rule that is not known here; write it out, as saving the config with transformers does"
        )
    for key, values in implied_lists(scope, count).items():
        pattern = key.endswith("block_types")
        if not scope.get(key) or (pattern and len(scope[key]) != count):
            scope[key] = values
    written = implied_lists(scope, count)
    refit_rules(scope, layers, count)
    for key in COUNT_KEYS:
        if as_int(scope.get(key)) == count:
            scope[key] = len(layers)
    warnings = []
    predictions = max((as_int(scope.get(key)) or 0 for key in PREDICTION_KEYS), default=0)
    for key, value in list(scope.items()):
        scope[key] = slice_value(key, value, layers, count, predictions)
        unknown = key not in RULE_KEYS and key not in written and _UNKNOWN_RULE.search(key)
        if unknown and (as_int(value) or 0) > (0 if "shared" in key else 1):
            warnings.append(f"{key}={value} depends on the position of layers and is left as it is")
    return [*warnings, *stale_rules(scope, len(layers))]


def _check_first_layer(layers: Sequence[int], anatomy: Anatomy) -> None:
    """Check that a layer 0 with other norms (RWKV, ModernBERT) stays first and is used once."""
    norms: dict[int, set[str]] = {index: set() for index in range(anatomy.n_layers)}
    for part in anatomy.parts.values():
        if part.stack == anatomy.main and part.role == "norm" and part.layer is not None:
            norms[part.layer].add(anatomy.rename_layer(part.name, 0))
    rest = [norms[index] for index in range(1, anatomy.n_layers)]
    # with two layers, it is unclear which one is the exception
    if len(rest) < 2 or any(other != rest[0] for other in rest) or norms[0] == rest[0]:
        return
    if layers[0] != 0 or 0 in layers[1:]:
        raise UnsupportedError(
            f"{anatomy.main}: layer 0 has other norms than the rest, so it must stay first and alone; "
            f"the chosen layers have it at {[position for position, index in enumerate(layers) if index == 0] or 'none'}"
        )
