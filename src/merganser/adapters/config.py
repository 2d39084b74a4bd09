"""`adapter_config.json`: the scale of a LoRA adapter, and the settings that make it more than W + scale * B A."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from ..jsonfile import read_object

CONFIG_NAME = "adapter_config.json"

# If one of these is set, the adapter is not W + scale * B A.
_REFUSED = {
    "use_dora": "it is a DoRA adapter, which also changes the length of each row",
    "lora_bias": "its B matrices have biases",
    "trainable_token_indices": "it replaces single rows of the embeddings",
    "target_parameters": "it changes parameters that are no modules",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it acts behind certain tokens only",
    "use_qalora": "it is a QALoRA adapter, tied to a quantised base",
    "use_bdlora": "it is a block-diagonal LoRA adapter",
    "arrow_config": "it chooses between adapters for each token",
    "kasa_config": "it is a KaSA adapter, which also cuts singular values of the base",
    "monteclora_config": "it is a MonteCLoRA adapter, which draws its weights",
    "velora_config": "it is a VeLoRA adapter",
    "megatron_config": "it belongs to a model of Megatron",
}
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_REMEDY = "merge it with the program that made it, and give the merged model"


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The settings of `adapter_config.json` that the weights depend on.

    Args:
        file: The file.
        r: Rank.
        alpha: lora_alpha.
        rslora: Whether the scale is alpha / sqrt(r) instead of alpha / r.
        rank_pattern: Ranks that differ from r, by a regular expression for the end of a module's name.
        alpha_pattern: Values of alpha that differ, by such an expression.
        transposed: Whether the base stores its weights as [in, out] (fan_in_fan_out).
        base: Name of the base model; None if the config does not name it.
    """

    file: Path
    r: float
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    transposed: bool
    base: str | None

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of B A for a module.

        Args:
            module: Name of the module in the base model.
            rank: Rows of its A.

        Raises:
            CheckpointError: The rank is not the one that the config says.
        """
        said = _match(self.rank_pattern, module, self.r)
        if said != rank:
            raise CheckpointError(f"{self.file}: {module} has rank {said:g} by the config, and A has {rank} rows")
        alpha = _match(self.alpha_pattern, module, self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)


def read_config(folder: Path) -> LoraConfig:
    """Read `adapter_config.json`.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: It is damaged.
        UnsupportedError: The adapter is not plain LoRA.
    """
    file = folder / CONFIG_NAME
    config = read_object(file)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{file}: peft_type is {kind!r}; only LORA adapters can be applied to weights here")
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise UnsupportedError(f"{file}: {key}: {meaning}, which cannot be read here; {_REMEDY}")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(
            f"{file}: bias is {config['bias']!r}: the adapter holds biases of the base, which cannot be read here; "
            f"only 'none' can. {_REMEDY[0].upper()}{_REMEDY[1:]}"
        )
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise UnsupportedError(
            f"{file}: init_lora_weights is {start!r}, which also changes the base's weights, or may; save the adapter "
            "with peft's path_initial_model_for_weight_conversion, or merge it with peft and give the merged model"
        )
    return LoraConfig(
        file,
        _number(file, "r", config.get("r")),
        _number(file, "lora_alpha", config.get("lora_alpha")),
        bool(config.get("use_rslora")),
        _pattern(file, "rank_pattern", config),
        _pattern(file, "alpha_pattern", config),
        bool(config.get("fan_in_fan_out")),
        config["base_model_name_or_path"] if isinstance(config.get("base_model_name_or_path"), str) else None,
    )


def _number(file: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{file}: {key} must be a number above 0, found {value!r}")
    return float(value)


def _pattern(file: Path, key: str, config: Mapping[str, Any]) -> dict[str, float]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: {key} must be a mapping from names of modules to numbers, found {found!r}")
    for name in found:
        try:
            re.compile(name)
        except re.error as error:
            raise CheckpointError(f"{file}: {key}: {name!r} is no regular expression: {error}") from None
    return {name: _number(file, f"{key}.{name}", value) for name, value in found.items()}


def _match(pattern: Mapping[str, float], module: str, otherwise: float) -> float:
    """Return the value of the first name that the module's name ends in, as peft looks it up."""
    found = (value for name, value in pattern.items() if re.match(rf"(.*\.)?({name})$", module))
    return next(found, otherwise)
