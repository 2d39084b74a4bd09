"""`adapter_config.json`: what an adapter's tensors mean, and the settings that cannot be understood here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ..errors import CheckpointError, UnsupportedError, did_you_mean
from ..jsonfile import read_object
from ..wording import brief
from .patterns import PatternError, first_matches

CONFIG_NAME = "adapter_config.json"

# If one of these is set, the adapter is more than the kinds of change that are known here.
_REFUSED = {
    "lora_bias": "its B matrices have biases",
    "trainable_token_indices": "it replaces single rows of the embeddings",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "use_qalora": "it is a QALoRA adapter, tied to a quantised base",
    "use_bdlora": "it is a block-diagonal LoRA adapter",
    "arrow_config": "it chooses between adapters for each token",
    "kasa_config": "it is a KaSA adapter, which also cuts singular values of the base",
    "monteclora_config": "it is a MonteCLoRA adapter, which draws its weights",
    "velora_config": "it is a VeLoRA adapter",
    "megatron_config": "it belongs to a model of Megatron",
}

_MEANT = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "base_model_name_or_path", "target_parameters", "ensure_weight_tying", "bias", "init_lora_weights",
)  # fmt: skip
# These say how the adapter was trained or is loaded; which tensors it changes is told by its file.
_HARMLESS = frozenset((
    "auto_mapping", "peft_version", "revision", "task_type", "inference_mode", "lora_dropout", "target_modules",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "enable_lora",
    "merge_weights", "feedforward_modules", "init_ia3_weights", "unsloth_fixed",
))  # fmt: skip
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_KINDS = ("LORA", "IA3")
_REMEDY = "merge it with the program that made it, and give the merged model"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The settings of `adapter_config.json` that the weights depend on.

    Args:
        file: The file.
        kind: LoRA (with its variants rsLoRA and DoRA), or IA3.
        r: Rank.
        alpha: lora_alpha.
        rslora: Whether the scale is alpha / sqrt(r) instead of alpha / r.
        dora: Whether the rows of each changed weight are scaled to a stored length.
        rank_pattern: Ranks that differ from r, by a regular expression for the end of a module's name.
        alpha_pattern: Values of alpha that differ, by a regular expression as in `rank_pattern`.
        transposed: Whether the base stores its weights as [in, out] (fan_in_fan_out).
        base: Name of the base model; None if the config does not name it.
        parameters: Ends of the names of parameters that it changes directly, such as packed experts.
        keeps_ties: Whether a tied head changes with the embeddings (ensure_weight_tying).
    """

    file: Path
    kind: Literal["LORA", "IA3"]
    r: float
    alpha: float
    rslora: bool
    dora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    transposed: bool
    base: str | None
    parameters: tuple[str, ...]
    keeps_ties: bool

    @property
    def text(self) -> str:
        """The kind in words."""
        if self.kind == "IA3":
            return "IA3"
        return ("rs" if self.rslora else "") + ("LoRA with lengths (DoRA)" if self.dora else "LoRA")

    def scales(self, rows: Mapping[str, int]) -> dict[str, float]:
        """Return the factors of B A.

        Args:
            rows: Rows of A for each module, by the module's name in the base model. For packed experts they are a
                multiple of the rank.

        Raises:
            CheckpointError: A rank differs from the config, or a pattern cannot be matched.
        """
        ranks = self.ranks([*rows])
        alphas = self._looked_up("alpha_pattern", self.alpha_pattern, [*rows], self.alpha)
        for module, count in rows.items():
            packed = bool(self.parameters) and count % ranks[module] == 0
            if ranks[module] != count and not packed:
                raise CheckpointError(
                    f"{self.file}: {module} has rank {ranks[module]:g} by the config, and A has {count} rows"
                )
        return {module: alphas[module] / (rank**0.5 if self.rslora else rank) for module, rank in ranks.items()}

    def ranks(self, modules: Sequence[str]) -> dict[str, float]:
        """Return the rank of each module by the config.

        Raises:
            CheckpointError: A pattern cannot be matched.
        """
        return self._looked_up("rank_pattern", self.rank_pattern, modules, self.r)

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


def read_config(folder: Path) -> AdapterConfig:
    """Read `adapter_config.json`.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: It is damaged.
        UnsupportedError: It has a setting that is not understood here; the message names it.
    """
    file = folder / CONFIG_NAME
    config = read_object(file)
    kind = config.get("peft_type")
    if kind not in _KINDS:
        raise UnsupportedError(
            f"{file}: peft_type is {brief(kind)}; adapters of {' and '.join(_KINDS)} can be applied to weights here. "
            f"{_REMEDY[0].upper()}{_REMEDY[1:]}"
        )
    _refuse_unknown(file, config)
    if config.get("bias", "none") not in ("none", "all"):
        raise UnsupportedError(
            f"{file}: bias is {brief(config['bias'])}: peft does not save all biases that were trained then; "
            f"'none' and 'all' can be read. {_REMEDY[0].upper()}{_REMEDY[1:]}"
        )
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise UnsupportedError(
            f"{file}: init_lora_weights is {brief(start)}, which also changes the base's weights, or may; save the adapter "
            "with peft's path_initial_model_for_weight_conversion, or merge it with peft and give the merged model"
        )
    low_rank = kind == "LORA"
    return AdapterConfig(
        file=file,
        kind=cast('Literal["LORA", "IA3"]', kind),
        r=_number(file, "r", config.get("r")) if low_rank else 1.0,
        alpha=_number(file, "lora_alpha", config.get("lora_alpha")) if low_rank else 1.0,
        rslora=_flag(file, "use_rslora", config),
        dora=_flag(file, "use_dora", config),
        rank_pattern=_pattern(file, "rank_pattern", config),
        alpha_pattern=_pattern(file, "alpha_pattern", config),
        transposed=_flag(file, "fan_in_fan_out", config),
        base=config["base_model_name_or_path"] if isinstance(config.get("base_model_name_or_path"), str) else None,
        parameters=_names(file, "target_parameters", config),
        keeps_ties=_flag(file, "ensure_weight_tying", config),
    )


def _refuse_unknown(file: Path, config: Mapping[str, Any]) -> None:
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise UnsupportedError(f"{file}: {key}: {meaning}, which cannot be read here; {_REMEDY}")
    for key, value in config.items():
        if value and key not in _HARMLESS and key not in _MEANT and key not in _REFUSED:
            raise UnsupportedError(
                f"{file}: {brief(key)} is {brief(value)}: this setting is not known here, and may change what the adapter "
                f"does.{did_you_mean(key, _MEANT)} If it does not, remove it from the file; else {_REMEDY}"
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


def _names(file: Path, key: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    found = config.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{file}: {key} must be a list of names of parameters, found {brief(found)}")
    return tuple(found)
