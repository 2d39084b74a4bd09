"""Architectures of mixtures: the names of their tensors and the keys of their configs, as in published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..anatomy.settings.function import settings
from ..errors import RecipeError, UnsupportedError, did_you_mean
from .recipe import PROMPTED, MixtureRecipe

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
        shared: Whether it may have a shared expert, which computes every token.
        needs_shared: Whether it must have one.
        gated: Whether a gate weighs the shared expert.
        shared_name: The module of the shared expert, within the block.
        dense_key: Key of the first layers that stay dense; None if all have experts.
        count: Key of the number of experts.
        settings: Further keys.
        dropped: Keys of dense models that it does not have.
        sized: Whether the experts' width is `moe_intermediate_size`.
        biased: Whether queries, keys and values have biases; where the dense model has none, these are zeros.
        untied: Whether it has a head of its own; where the dense model has none, that is a copy of the embedding.
        plain_heads: Whether the size of a head is that of the model divided by the number of heads.
        windows: Where attention may see a window alone: in "all" layers or none, in each "layer" by itself, or nowhere.
    """

    name: str
    model_class: str
    inputs: tuple[str, ...]
    block: str = "mlp"
    projections: Mapping[str, str] = field(default_factory=lambda: dict(zip(_PROJECTIONS, _PROJECTIONS, strict=True)))
    shared: bool = False
    needs_shared: bool = False
    gated: bool = False
    shared_name: str = "shared_expert"
    dense_key: str | None = None
    count: str = "num_experts"
    settings: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    sized: bool = True
    biased: bool = False
    untied: bool = False
    plain_heads: bool = False
    windows: Literal["all", "layer", None] = None

    def router(self, layer: str) -> str:
        """Return the name of a layer's router."""
        return f"{layer}.{self.block}.gate.weight"

    def expert(self, layer: str, expert: int, projection: str) -> str:
        """Return the name of an expert's projection."""
        return f"{layer}.{self.block}.experts.{expert}.{self.projections[projection]}.weight"

    def shared_expert(self, layer: str, projection: str) -> str:
        """Return the name of the shared expert's projection."""
        return f"{layer}.{self.block}.{self.shared_name}.{projection}.weight"

    def shared_gate(self, layer: str) -> str:
        """Return the name of the shared expert's gate."""
        return f"{layer}.{self.block}.shared_expert_gate.weight"

    def config(
        self, dense: Mapping[str, Any], experts: int, per_token: int, *, shared: bool = False, dense_layers: int = 0
    ) -> dict[str, Any]:
        """Return config.json of the mixture.

        Args:
            dense: config.json of the dense model.
            experts: Number of experts.
            per_token: Number of experts that compute each token.
            shared: Whether there is a shared expert.
            dense_layers: Number of first layers that stay dense.
        """
        found = {key: value for key, value in dense.items() if key not in self.dropped}
        found |= {"architectures": [self.model_class], "model_type": self.name}
        found |= {self.count: experts, "num_experts_per_tok": per_token, **self.settings}
        width = dense["intermediate_size"]
        if self.sized:
            found["moe_intermediate_size"] = width
        if self.gated:
            found["shared_expert_intermediate_size"] = width
            found["qkv_bias"] = self.biased
        elif self.shared:
            found["n_shared_experts"] = 1 if shared else None
        if self.untied:
            found["tie_word_embeddings"] = False
        scaling = dense.get("rope_scaling")
        if "auto_map" in self.settings and isinstance(scaling, dict) and "rope_type" in scaling:
            # as the code of that time names it
            found["rope_scaling"] = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
        found |= self._windows(dense)
        if self.dense_key is not None:
            found[self.dense_key] = [*range(dense_layers)] if self.dense_key == "mlp_only_layers" else dense_layers
        return found

    def _windows(self, dense: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of sliding windows, where the architecture reads them otherwise than the dense model."""
        own = settings(dense)
        window, count = own.get("sliding_window"), dense.get("num_hidden_layers")
        if self.windows == "all":
            # said also where there is none, as releases of transformers have different defaults
            return {"sliding_window": window or None}
        if not window:
            return {}
        if self.windows is None:
            return {"sliding_window": None, "use_sliding_window": False}
        # in which layers they are by default differs between Qwen2 and Qwen2-MoE, so it is said
        types = own.get("layer_types") or ["sliding_attention"] * int(count or 0)
        return {"use_sliding_window": True, "sliding_window": window, "layer_types": types}

    def notes(self, dense: Mapping[str, Any]) -> list[str]:
        """Return what the user should know of the output.

        Args:
            dense: config.json of the dense model.
        """
        found = []
        window = settings(dense).get("sliding_window")
        if window and self.windows is None:
            found.append(
                f"{self.name} has no sliding windows, and the base's layers see {window:,} tokens: longer texts are read otherwise"
            )
        if "auto_map" in self.settings:
            found.append(
                f"transformers has no class for the architecture {self.name}: it loads this model with the code of deepseek-ai "
                "alone (trust_remote_code), and whether it does was not checked"
            )
        if self.gated and _odd_heads(dense):
            found.append(
                f"the base's heads are not as large together as the model: transformers loads such a {self.name}, vLLM does not"
            )
        return found


def _odd_heads(dense: Mapping[str, Any]) -> bool:
    """Return whether the heads together are not as large as the model."""
    heads, size, own = (dense.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim"))
    return bool(own is not None and heads and own * heads != size)


_ROUTED = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
_EVERY_LAYER = {"decoder_sparse_step": 1, "norm_topk_prob": True}
_DEEPSEEK_CODE = "deepseek-ai/deepseek-moe-16b-base"
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
        windows="all",
    ),
    Layout(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        ("qwen3",),
        dense_key="mlp_only_layers",
        settings=_ROUTED | _EVERY_LAYER,
        dropped=("max_window_layers", "layer_types"),
    ),
    Layout(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        ("qwen2", "llama", "mistral"),
        shared=True,
        needs_shared=True,
        gated=True,
        # transformers asks qkv_bias; vLLM and llama.cpp expect the biases that every published checkpoint has
        biased=True,
        dense_key="mlp_only_layers",
        settings=_ROUTED | _EVERY_LAYER,
        dropped=_OF_LLAMA,
        windows="layer",
    ),
    Layout(
        "flex_olmo",
        "FlexOlmoForCausalLM",
        ("olmo2",),
        settings=_ROUTED | {"norm_topk_prob": True},
        sized=False,
    ),
    # that of DeepSeek-MoE 16B; V2 and V3 compress keys and values, which no dense model has
    Layout(
        "deepseek",
        "DeepseekForCausalLM",
        ("llama", "mistral"),
        shared=True,
        shared_name="shared_experts",
        # the authors' code can tie a head, vLLM's class cannot; both divide the model's size by the number of heads
        untied=True,
        plain_heads=True,
        dense_key="first_k_dense_replace",
        count="n_routed_experts",
        settings={
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
            "norm_topk_prob": True,
            "auto_map": {
                "AutoConfig": f"{_DEEPSEEK_CODE}--configuration_deepseek.DeepseekConfig",
                "AutoModel": f"{_DEEPSEEK_CODE}--modeling_deepseek.DeepseekModel",
                "AutoModelForCausalLM": f"{_DEEPSEEK_CODE}--modeling_deepseek.DeepseekForCausalLM",
            },
        },
        dropped=("mlp_bias",),
    ),
)
LAYOUTS = {layout.name: layout for layout in _ALL}
# what recipes of mergekit-moe call them; of several, the first that fits the base
_ALIASES = {
    "qwen": ("qwen2_moe", "qwen3_moe"),
    "qwen moe": ("qwen2_moe",),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe",),
    "qwen3 moe": ("qwen3_moe",),
    "deepseek moe": ("deepseek",),
}
_IMPOSSIBLE = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3"),
        "its attention compresses keys and values, which no dense model does; 'deepseek' is the architecture of DeepSeek-MoE "
        "16B, whose attention is Llama's",
    ),
    "olmoe": "its attention normalises queries and keys over all heads, behind norms that stand before the layers; no dense "
    "model of transformers does both",
    "gpt_oss": "its attention has sinks and its experts clamp what they gate, which no dense model does",
}
_IMPOSSIBLE |= {"deepseek v2": _IMPOSSIBLE["deepseek_v2"], "deepseek v3": _IMPOSSIBLE["deepseek_v3"]}
_IMPOSSIBLE |= {"gpt-oss": _IMPOSSIBLE["gpt_oss"]}
"""Architectures that would compute something else than the dense models, and why."""


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
        if name in _IMPOSSIBLE:
            raise UnsupportedError(
                f"{place}: {recipe.architecture} cannot be built from dense models: {_IMPOSSIBLE[name]}. {_known()}"
            )
        named = _ALIASES.get(name, (name,))
        if named[0] not in LAYOUTS:
            raise RecipeError(f"{place}: {recipe.architecture!r} is not known.{did_you_mean(name, LAYOUTS)} {_known()}")
        found = LAYOUTS[next((own for own in named if kind in LAYOUTS[own].inputs), named[0])]
    else:
        fitting = [layout for layout in _ALL if kind in layout.inputs]
        with_shared = recipe.shared_expert is not None
        chosen = [layout for layout in fitting if _accepts(recipe, layout)]
        chosen = chosen or [layout for layout in fitting if layout.needs_shared == with_shared] or fitting
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
    if layout.needs_shared and recipe.shared_expert is None:
        raise RecipeError(
            f"{recipe.place_of('shared_experts')}: {layout.name} has a shared expert, which computes every token: name one in "
            "'shared_experts'"
        )
    if not layout.shared and recipe.shared_expert is not None:
        raise RecipeError(f"{recipe.place_of('shared_experts')}: {layout.name} has no shared expert")
    _check_gate(recipe, layout)
    layers = config.get("num_hidden_layers")
    if recipe.dense_layers and layout.dense_key is None:
        raise RecipeError(
            f"{recipe.place_of('dense_layers')}: all layers of {layout.name} have experts; "
            f"{' and '.join(each.name for each in _ALL if each.dense_key)} can have dense ones"
        )
    if isinstance(layers, int) and recipe.dense_layers >= layers:
        raise RecipeError(
            f"{recipe.place_of('dense_layers')}: {recipe.dense_layers} layers would stay dense, and the base has {layers}"
        )
    if config.get("use_sliding_window") and "layer_types" in layout.dropped:
        raise RecipeError(f"{place}: the base has windows in some of its layers, which {layout.name} cannot express")
    if layout.plain_heads and _odd_heads(config):
        heads, size, own = (config.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim"))
        raise RecipeError(
            f"{place}: the base has {heads} heads of {own} in a model of {size}, which {layout.name} cannot express: its heads "
            "are as large together as the model"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) and key in layout.dropped and not (layout.gated and key == "attention_bias"):
            raise RecipeError(f"{place}: the base has {key}, which {layout.name} cannot express")


def _accepts(recipe: MixtureRecipe, layout: Layout) -> bool:
    """Return whether an architecture can have the shared expert of a recipe, with its gate's prompts, or has none."""
    shared = recipe.shared_expert
    if shared is None:
        return not layout.needs_shared
    prompts = bool(shared.positive or shared.negative)
    return layout.shared and (
        bool(shared.positive) or recipe.gate_mode not in PROMPTED if layout.gated else not prompts
    )


def _check_gate(recipe: MixtureRecipe, layout: Layout) -> None:
    """Refuse a shared expert that lacks prompts for its gate, or has some and no gate."""
    shared = recipe.shared_expert
    if shared is None:
        return
    if layout.gated and recipe.gate_mode in PROMPTED and not shared.positive:
        raise RecipeError(f"{shared.place}: gate_mode {recipe.gate_mode} needs positive_prompts of each expert")
    if not layout.gated and (shared.positive or shared.negative):
        raise RecipeError(
            f"{shared.place}: {layout.name} has no gate for its shared expert, so its prompts mean nothing; leave them out"
        )


def _known() -> str:
    return "; ".join(f"{layout.name} is built from {' or '.join(layout.inputs)}" for layout in _ALL)
