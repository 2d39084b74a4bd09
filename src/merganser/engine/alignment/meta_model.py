"""Build models with transformers on the meta device, without memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["build_model"]

# A config may name code to download and run (kernels), which is removed from it, or weights to download (backbones),
# for which no model is built.
_FETCHES_CODE = re.compile(
    r"_implementation|^kernel_config$|^use_kernels$|^fusion_config$|^quantization_config$|name_or_path"
)
_FETCHES_WEIGHTS = re.compile(r"backbone|timm|pretrained_model")
# Configs are untrusted: reject numbers with which building a model would take minutes.
_MODULES = re.compile(r"layer|depth|block|expert|stage|codebook")
_SIZES = re.compile(r"size|dim|theta")
_MOST_MODULES = 5_000
_MOST_TOGETHER = 200_000
_MOST_LABELS = 1_000_000
_MOST = 20_000_000
_MOST_REPEATS = 1_000


def build_model(config: Mapping[str, Any]) -> Any | str | None:
    """Return the model that a config describes, on the meta device.

    Importing transformers takes one or two seconds, so call this only where a merge needs it. No code of a
    checkpoint is run, and nothing is downloaded.

    Args:
        config: The contents of config.json.

    Returns:
        The model; the error message if transformers rejects the config; None if transformers is missing or does not
        know the class, or if the config needs custom code or downloaded weights, or is too large.
    """
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures) or not _is_tried(config):
        return None
    try:
        import torch
        import transformers
    except ImportError:
        return None
    kind: Any = getattr(transformers, str(architectures[0]), None)
    known = getattr(kind, "config_class", None)
    if known is None or known.model_type != config.get("model_type"):
        return None
    logging: Any = transformers.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return kind(known.from_dict({**_harmless(config), "attn_implementation": "eager"}))
    except Exception as error:  # a config class may raise anything
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
    finally:
        logging.set_verbosity(verbosity)


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, including those of nested configs."""
    for key, value in config.items():
        yield str(key), value
        if isinstance(value, Mapping):
            yield from _settings(value)


def _numbers(value: Any) -> Iterator[int]:
    """Yield the integers in a value, which may be a nested list."""
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _is_tried(config: Mapping[str, Any]) -> bool:
    """Return whether a config needs no download and no custom code, and its model can be built in seconds."""
    layers = experts = 1
    for key, value in _settings(config):
        if value and (key == "auto_map" or _FETCHES_WEIGHTS.search(key)):
            return False
        largest = max(_numbers(value), default=0)
        if largest > _most(key):
            return False
        if "expert" in key and not _SIZES.search(key):
            experts = max(experts, largest)
        elif key.endswith(("layers", "n_layer", "depth")):
            layers = max(layers, largest)
    return layers * experts <= _MOST_TOGETHER


def _most(key: str) -> int:
    """Return the largest value of a setting with which a model can be built in seconds."""
    if key == "attention_types":
        return _MOST_REPEATS
    if "label" in key:
        return _MOST_LABELS
    return _MOST_MODULES if _MODULES.search(key) and not _SIZES.search(key) else _MOST


def _harmless(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without settings that would download code."""
    return {key: _plain(value) for key, value in config.items() if not _FETCHES_CODE.search(str(key))}


def _plain(value: Any) -> Any:
    """Return a value with the infinite numbers that transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return float(value["__float__"]) if value.keys() == {"__float__"} else _harmless(value)
    return value
