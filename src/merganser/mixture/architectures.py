"""Architectures of mixtures: the names of their tensors and the keys of their configs, as in published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import RecipeError, UnsupportedError, did_you_mean
from .recipe import MixtureRecipe

__all__ = ["LAYOUTS", "Layout", "choose_layout"]

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Layout:
    """An architecture of mixtures.

    Args:
        name: Its `model_type`.
        model_class: Its class in transformers.
        inputs: `model_type` of the dense models that it can be built from.
        projections: By the name of a projection of the dense models, that of an expert's.
        block: The module that holds router and experts, within a layer.
        shared: Whether it has a shared expert, which computes every token.
        count: Key of the number of experts.
        settings: Further keys.
        dropped: Keys of dense models that it does not have.
        sized: Whether the experts' width is `moe_intermediate_size`.
    """

    name: str
    model_class: str
    inputs: tuple[str, ...]
    block: str = "mlp"
    projections: Mapping[str, str] = field(default_factory=lambda: dict(zip(_PROJECTIONS, _PROJECTIONS, strict=True)))
    shared: bool = False
    count: str = "num_experts"
    settings: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    sized: bool = True

    def router(self, layer: str) -> str:
        """Return the name of a layer's router."""
        return f"{layer}.{self.block}.gate.weight"

    def expert(self, layer: str, expert: int, projection: str) -> str:
        """Return the name of an expert's projection."""
        return f"{layer}.{self.block}.experts.{expert}.{self.projections[projection]}.weight"

    def shared_expert(self, layer: str, projection: str) -> str:
        """Return the name of the shared expert's projection."""
        return f"{layer}.{self.block}.shared_expert.{projection}.weight"

    def shared_gate(self, layer: str) -> str:
        """Return the name of the shared expert's gate."""
        return f"{layer}.{self.block}.shared_expert_gate.weight"

    def config(self, dense: Mapping[str, Any], experts: int, per_token: int) -> dict[str, Any]:
        """Return config.json of the mixture.

        Args:
            dense: config.json of the dense model.
            experts: Number of experts.
            per_token: Number of experts that compute each token.
        """
        found = {key: value for key, value in dense.items() if key not in self.dropped}
        found |= {"architectures": [self.model_class], "model_type": self.name}
        found |= {self.count: experts, "num_experts_per_tok": per_token, **self.settings}
        width = dense["intermediate_size"]
        if self.sized:
            found["moe_intermediate_size"] = width
        if self.shared:
            found["shared_expert_intermediate_size"] = width
            found["qkv_bias"] = dense["model_type"] == "qwen2" or bool(dense.get("attention_bias"))
        return found


_ROUTED = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
_OF_LLAMA = ("attention_bias", "mlp_bias", "pretraining_tp")

_ALL = (
    Layout(
        "mixtral",
        "MixtralForCausalLM",
        ("llama", "mistral"),
        block="block_sparse_moe",
        projections={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        count="num_local_experts",
        settings={**_ROUTED, "router_jitter_noise": 0.0},
        dropped=_OF_LLAMA,
        sized=False,
    ),
    Layout(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        ("qwen3",),
        settings=_ROUTED | _EVERY_LAYER,
        dropped=("max_window_layers", "layer_types"),
    ),
    Layout(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        ("qwen2", "llama", "mistral"),
        shared=True,
        settings=_ROUTED | _EVERY_LAYER,
        dropped=_OF_LLAMA,
    ),
    Layout(
        "flex_olmo",
        "FlexOlmoForCausalLM",
        ("olmo2",),
        settings=_ROUTED | {"norm_topk_prob": True},
        sized=False,
    ),
)
LAYOUTS = {layout.name: layout for layout in _ALL}
# what recipes of mergekit-moe call them
_ALIASES = {
    "qwen": "qwen2_moe",
    "qwen moe": "qwen2_moe",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "qwen3 moe": "qwen3_moe",
}
_NOT_BUILT = ("deepseek", "deepseek moe", "deepseek_v2", "deepseek_v3", "olmoe")


def choose_layout(recipe: MixtureRecipe, config: Mapping[str, Any]) -> Layout:
    """Return the architecture of the output.

    Args:
        recipe: The recipe.
        config: config.json of the base.

    Raises:
        RecipeError: The architecture is not known, or the recipe does not fit it.
        UnsupportedError: No mixture can be built from such models, or not of this architecture.
    """
    kind = config.get("model_type")
    place = recipe.place_of("architecture")
    if recipe.architecture is not None:
        name = recipe.architecture.lower()
        name = _ALIASES.get(name, name)
        if name in _NOT_BUILT:
            raise UnsupportedError(
                f"{place}: mixtures of the architecture {recipe.architecture} cannot be built yet; {_known()}"
            )
        if name not in LAYOUTS:
            raise RecipeError(f"{place}: {recipe.architecture!r} is not known.{did_you_mean(name, LAYOUTS)} {_known()}")
        found = LAYOUTS[name]
    else:
        fitting = [layout for layout in _ALL if kind in layout.inputs]
        with_shared = recipe.shared_expert is not None
        chosen = [layout for layout in fitting if layout.shared == with_shared] or fitting
        if not chosen:
            raise UnsupportedError(
                f"{recipe.place_of('base_model')}: no mixture can be built from models of type {kind!r}; {_known()}"
            )
        found = chosen[0]
    _check(recipe, found, config)
    return found


def _check(recipe: MixtureRecipe, layout: Layout, config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    place = recipe.place_of("base_model")
    if kind not in layout.inputs:
        raise RecipeError(
            f"{place}: {layout.name} is built from {' or '.join(layout.inputs)}, and the base is of type {kind!r}"
        )
    if layout.shared and recipe.shared_expert is None:
        raise RecipeError(
            f"{recipe.place_of('shared_experts')}: {layout.name} has a shared expert, which computes every token: name one in "
            "'shared_experts'"
        )
    if not layout.shared and recipe.shared_expert is not None:
        raise RecipeError(f"{recipe.place_of('shared_experts')}: {layout.name} has no shared expert")
    if config.get("use_sliding_window") and "layer_types" in layout.dropped:
        raise RecipeError(f"{place}: the base has windows in some of its layers, which {layout.name} cannot express")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) and key in layout.dropped and not (layout.shared and key == "attention_bias"):
            raise RecipeError(f"{place}: the base has {key}, which {layout.name} cannot express")


def _known() -> str:
    return "; ".join(f"{layout.name} is built from {' or '.join(layout.inputs)}" for layout in _ALL)
