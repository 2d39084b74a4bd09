"""`adapter_config.json`: the scale of a LoRA adapter, and the settings that make it more than W + scale * B A."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from ..jsonfile import read_object
from ..wording import brief
from .patterns import PatternError, first_matches

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
        alpha_pattern: Values of alpha that differ, by a regular expression as in `rank_pattern`.
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

    def scales(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Return the factors of B A.

        Args:
            ranks: Rows of A for each module, by the module's name in the base model.

        Raises:
            CheckpointError: A rank differs from the config, or a pattern cannot be matched.
        """
        said = self._looked_up("rank_pattern", self.rank_pattern, [*ranks], self.r)
        alphas = self._looked_up("alpha_pattern", self.alpha_pattern, [*ranks], self.alpha)
        for module, rank in ranks.items():
            if said[module] != rank:
                raise CheckpointError(
                    f"{self.file}: {module} has rank {said[module]:g} by the config, and A has {rank} rows"
                )
        return {module: alphas[module] / (rank**0.5 if self.rslora else rank) for module, rank in ranks.items()}

    def _looked_up(
        self, key: str, pattern: Mapping[str, float], modules: Sequence[str], otherwise: float
    ) -> dict[str, float]:
        """Return the value of each module: the value of the first pattern that matches its name."""
        try:
            first = first_matches([*pattern], modules)
        except PatternError as error:
            raise CheckpointError(f"{self.file}: {key}: {error}") from None
        values = [*pattern.values()]
        return {
            module: otherwise if index is None else values[index] for module, index in zip(modules, first, strict=True)
        }


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
        raise UnsupportedError(f"{file}: peft_type is {brief(kind)}; only LORA adapters can be applied to weights here")
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise UnsupportedError(f"{file}: {key}: {meaning}, which cannot be read here; {_REMEDY}")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(
            f"{file}: bias is {brief(config['bias'])}: the adapter holds biases of the base, which cannot be read here; "
            f"only 'none' can. {_REMEDY[0].upper()}{_REMEDY[1:]}"
        )
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise UnsupportedError(
            f"{file}: init_lora_weights is {brief(start)}, which also changes the base's weights, or may; save the adapter "
            "with peft's path_initial_model_for_weight_conversion, or merge it with peft and give the merged model"
        )
    return LoraConfig(
        file,
        _number(file, "r", config.get("r")),
        _number(file, "lora_alpha", config.get("lora_alpha")),
        _flag(file, "use_rslora", config),
        _pattern(file, "rank_pattern", config),
        _pattern(file, "alpha_pattern", config),
        _flag(file, "fan_in_fan_out", config),
        config["base_model_name_or_path"] if isinstance(config.get("base_model_name_or_path"), str) else None,
    )


def _number(file: Path, key: str, value: Any) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"{file}: {key} must be a finite number above 0, found {brief(value)}")
    return float(value)


def _flag(file: Path, key: str, config: Mapping[str, Any]) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{file}: {key} must be true or false, found {brief(value)}")
    return bool(value)


def _pattern(file: Path, key: str, config: Mapping[str, Any]) -> dict[str, float]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: {key} must be a mapping from names of modules to numbers, found {brief(found)}")
    return {name: _number(file, f"{key}.{name}", value) for name, value in found.items()}
