"""Detect quantised checkpoints, whose numbers become weights only with scales that are stored separately."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...tensor import TensorInfo

__all__ = ["SETTINGS_KEYS", "why_quantised"]

SETTINGS_KEYS = ("quantization_config", "compression_config", "quantization")
# Last components of tensor names that only quantised checkpoints use.
_MARKS = frozenset(
    ("qweight", "qzeros", "weight_packed", "weight_scale_inv", "SCB", "absmax", "nested_absmax", "quant_map")
)
# Those of scales that plain checkpoints may have, too.
_SCALES = ("weight_scale", "scales")
_OF_WEIGHTS = _MARKS.union(_SCALES)


def why_quantised(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return the evidence that a checkpoint is quantised, or None if its tensors are plain weights."""
    return _by_config(config) or _by_dtype(tensors) or _by_name(tensors)


def _by_config(config: Mapping[str, Any]) -> str | None:
    parts = [("", config)]
    parts += [
        (f"{key}.", value) for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)
    ]
    for prefix, part in parts:
        for key in SETTINGS_KEYS:
            settings = part.get(key)
            if not isinstance(settings, dict) or not settings:
                continue
            method = settings.get("quant_method")
            if isinstance(method, str):
                return f"{method} (config.json {prefix}{key}.quant_method)"
            return f"config.json has {prefix}{key}"
    return None


def _by_dtype(tensors: Mapping[str, TensorInfo]) -> str | None:
    for tensor in tensors.values():
        if tensor.dtype.kind == "quantised":
            return f"{tensor.dtype.name} (tensor {tensor.name!r})"
    return None


def _by_name(tensors: Mapping[str, TensorInfo]) -> str | None:
    # the last words of the names decide in most cases, and there are few of them
    last_words = {name.rpartition(".")[2] for name in tensors}
    telling = not last_words.isdisjoint(_OF_WEIGHTS) or any(word.endswith("_blocks") for word in last_words)
    if not telling and ".quant_state." not in "\n".join(tensors):
        return None
    for name in tensors:
        stem, _, last = name.rpartition(".")
        if last in _MARKS or ".quant_state." in name:
            return f"tensor {name!r} belongs to quantised weights"
        # Blocks of 4-bit numbers with a scale per block, and 8-bit weights with a scale per channel.
        partner = f"{stem}.weight" if last in _SCALES else name.removesuffix("_scales") + "_blocks"
        if partner in tensors and tensors[partner].dtype.kind == "int":
            return f"{tensors[partner].dtype.name} with scales (tensors {partner!r} and {name!r})"
    return None
