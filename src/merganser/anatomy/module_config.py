"""Make the config of a larger model whose tower, encoder or decoder has other layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UnsupportedError
from .infer import Anatomy
from .modules import find_modules
from .settings.config import COUNT_KEYS, as_int
from .slicing import slice_config

__all__ = ["slice_module_config"]

_OF_HALF = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}


def slice_module_config(
    config: Mapping[str, Any], module: str, layers: Sequence[int], *, anatomy: Anatomy
) -> dict[str, Any]:
    """Return a config in which one module, other than the language model, consists of these layers.

    Args:
        config: The contents of config.json.
        module: Name of the module.
        layers: For each layer of the result, the index of the layer that it comes from.
        anatomy: The structure of the whole checkpoint that the config describes.

    Raises:
        UnsupportedError: The config does not say, in a way that is known here, how many layers the module has.
    """
    stacks = {anatomy.parts[name].stack for name in find_modules(anatomy)[module]} - {None}
    (stack,) = stacks if len(stacks) == 1 else (None,)
    if stack is None:
        raise UnsupportedError(f"choosing layers needs a module with one stack of layers; {module} has {len(stacks)}")
    count = anatomy.stacks[stack]
    result = copy.deepcopy(dict(config))
    if list(layers) == list(range(count)):
        return result
    if module in _OF_HALF:
        _set_half(result, module, count, len(layers))
        return result
    own = [
        key for key, value in result.items() if isinstance(value, dict) and _counts(value, count) and _fits(key, module)
    ]
    if len(own) != 1:
        raise UnsupportedError(
            f"config.json: no sub-config is clearly that of {module} with {count} layers, so its layers cannot be chosen"
        )
    alone = Anatomy(
        parts=anatomy.parts,
        stacks={stack: count},
        main=stack,
        n_layers=count,
        tied=[],
        embedding=None,
        head=None,
        vocab_size=None,
    )
    result[own[0]] = slice_config(result[own[0]], layers, anatomy=alone).config
    return result


def _counts(config: Mapping[str, Any], count: int) -> bool:
    return any(as_int(config.get(key)) == count for key in COUNT_KEYS)


def _fits(key: str, module: str) -> bool:
    return any(word in key and word in module for word in ("vis", "audio", "speech"))


def _set_half(config: dict[str, Any], half: str, old: int, new: int) -> None:
    """Set the number of layers of the encoder or the decoder."""
    keys = [key for key in _OF_HALF[half] if as_int(config.get(key)) == old]
    if half == "decoder" and not keys and as_int(config.get("num_layers")) == old:
        # T5's decoder has as many layers as its encoder if the config does not say
        keys = ["num_decoder_layers"]
    elif half == "encoder" and keys and "decoder_layers" not in config and "num_decoder_layers" not in config:
        config["num_decoder_layers"] = old
    if not keys:
        raise UnsupportedError(f"config.json: no key says that the {half} has {old} layers, so they cannot be chosen")
    config.update(dict.fromkeys(keys, new))
