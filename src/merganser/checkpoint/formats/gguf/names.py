"""The names of the Hugging Face checkpoint for the tensors of a GGUF file, by family, and what converters did to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ....errors import UnsupportedError
from ....wording import some

__all__ = ["FAMILIES", "Family", "StoredName", "family_of", "gguf_name", "hf_name"]

_COMMON = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICHED = {
    **_COMMON,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
}
_DEEPSEEK = {
    **{name: ours for name, ours in _COMMON.items() if name not in ("attn_k", "attn_v", "attn_q_norm", "attn_k_norm")},
    **{name: ours for name, ours in _EXPERTS.items() if not name.endswith("shexp")},
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
}
_GPT_OSS = {
    **{
        name: ours
        for name, ours in _COMMON.items()
        if not name.startswith("ffn") and not name.endswith(("q_norm", "k_norm"))
    },
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
}
_MAMBA = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "output": "lm_head",
    "attn_norm": "norm",
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_out": "mixer.out_proj",
}
_TOP = ("token_embd", "output_norm", "output")
"""Modules outside of layers."""

_PHI = {**_COMMON, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp's converter treats a family of models.

    Args:
        names: Modules of the Hugging Face model by those of the file; `{}` stands for the number of an expert.
        permuted: Whether the rows of query and key projections were reordered.
        norms_plus_one: Whether one was added to the weights of norms.
        layers: What the names of layers begin with.
        bare: Names in layers that are not the weight or bias of a module, by those of the file.
        joined: How several tensors of the file make one; files of such families, and those with `bare` names, can be
            read and not written.
    """

    names: Mapping[str, str]
    permuted: bool = False
    norms_plus_one: bool = False
    layers: str = "model.layers."
    bare: Mapping[str, str] = field(default_factory=dict)
    joined: Literal["mla", "gate_up"] | None = None

    @property
    def is_writable(self) -> bool:
        """Whether files of this family can be written."""
        return self.joined is None and not self.bare


FAMILIES: dict[str, Family] = {
    "llama": Family({**_COMMON, **_MIXTRAL}, permuted=True),
    "smollm3": Family(_COMMON, permuted=True),
    "granite": Family(_COMMON, permuted=True),
    "qwen2": Family(_COMMON),
    "qwen3": Family(_COMMON),
    "qwen2moe": Family({**_COMMON, **_EXPERTS}),
    "qwen3moe": Family({**_COMMON, **_EXPERTS}),
    "phi3": Family(_PHI),
    "gemma": Family(_COMMON, norms_plus_one=True),
    "gemma2": Family(_SANDWICHED, norms_plus_one=True),
    "gemma3": Family(_SANDWICHED, norms_plus_one=True),
    "deepseek2": Family(_DEEPSEEK, bare={"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}, joined="mla"),
    "gpt-oss": Family(_GPT_OSS, bare={"attn_sinks.weight": "self_attn.sinks"}, joined="gate_up"),
    "mamba": Family(_MAMBA, layers="backbone.layers.", bare={"ssm_a": "mixer.A_log", "ssm_d": "mixer.D"}),
}
"""By `general.architecture`."""

DROPPED = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
"""Tensors that the config of the model replaces."""

_IN_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>[a-z_0-9]+)\.(?P<kind>weight|bias)")


def family_of(where: str, architecture: str) -> Family:
    """Return how a family is converted.

    Raises:
        UnsupportedError: It is not known.
    """
    found = FAMILIES.get(architecture)
    if found is None:
        raise UnsupportedError(
            f"{where}: the architecture {architecture!r} of GGUF cannot be read; those that can are "
            f"{some(sorted(FAMILIES), len(FAMILIES))}; give the safetensors checkpoint it was made from"
        )
    return found


def hf_name(family: Family, name: str) -> tuple[str, str] | None:
    """Return the name in the Hugging Face checkpoint, and the module in the file; None if the family has none."""
    if (found := _IN_LAYER.fullmatch(name)) and (bare := family.bare.get(found[2])):
        return f"{family.layers}{int(found[1])}.{bare}", found[2].partition(".")[0]
    match = _NAME.fullmatch(name)
    module = family.names.get(match["module"]) if match else None
    if match is None or module is None:
        return None
    top = match["module"] in _TOP
    if top is not (match["layer"] is None):
        return None
    layer = "" if top else f"{family.layers}{int(match['layer'])}."
    return f"{layer}{module}.{match['kind']}", match["module"]


@dataclass(frozen=True, slots=True)
class StoredName:
    """The name of a tensor in a GGUF file.

    Args:
        name: The name.
        module: Its module, without the layer.
        layer: Number of the layer; None outside of layers.
        expert: Which matrix of the stack it is; None if it is not an expert.
    """

    name: str
    module: str
    layer: int | None
    expert: int | None


_HF_NAME = re.compile(r"(?:model\.layers\.(?P<layer>\d+)\.)?(?P<module>.+)\.(?P<kind>weight|bias)")
_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


def gguf_name(family: Family, name: str) -> StoredName | None:
    """Return the name in the file of a tensor of the Hugging Face checkpoint; None if the family has none."""
    match = _HF_NAME.fullmatch(name)
    if match is None:
        return None
    module, expert = match["module"], _EXPERT.search(match["module"])
    if expert is not None:
        module = f"{module[: expert.start(1)]}{{}}{module[expert.end(1) :]}"
    own = next((ours for ours, theirs in family.names.items() if theirs == module), None)
    if own is None or (module.startswith("model.") or module == "lm_head") is not (match["layer"] is None):
        return None
    layer = None if match["layer"] is None else int(match["layer"])
    prefix = "" if layer is None else f"blk.{layer}."
    return StoredName(f"{prefix}{own}.{match['kind']}", own, layer, None if expert is None else int(expert[1]))
