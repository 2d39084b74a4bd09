"""Infer the role of a tensor from the words in its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["SIDE", "Part", "Position", "Role", "outside_position", "outside_role", "role_in_layer"]

Role = Literal["embedding", "head", "norm", "attention", "mlp", "expert", "router", "ssm", "conv", "position", "other"]
Position = Literal["before", "layer", "after"]


@dataclass(frozen=True, slots=True)
class Part:
    """The meaning of one tensor name.

    Attributes:
        name: The name in the file.
        stack: Prefix of the tensor's indexed stack ("model.layers"); None outside any stack.
        layer: Index in that stack; None outside stacks, and for prediction layers appended after the last layer.
        position: "layer" in the main stack (in any stack if there is no main one), else "before" or "after" the layers,
            where the tensor is used. A vision tower is "before".
        role: What the tensor does. Shared experts count as "expert"; biases have the role of their weight.
        expert: Index of the expert in layouts with one tensor per expert; None in fused layouts.
    """

    name: str
    stack: str | None
    layer: int | None
    position: Position
    role: Role
    expert: int | None


# Words in the names of parts other than the language model, such as vision towers.
SIDE = re.compile(
    r"vision|visual|image|audio|speech|multi_?modal|mm_projector|qformer|resampler|connector|feature_extractor"
    r"|talker|token2wav|\bmtp\b|nextn|draft|eagle|medusa"
)
_BEHIND = re.compile(r"\bmtp\b|nextn|draft|eagle|medusa|talker|token2wav")

_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)")
_POSITION = re.compile(
    r"rotary|inv_freq|rel(ative)?_(pos|attention_bias)|alibi|position_(emb|bias|ids)|embed_positions|pos_?emb"
    r"|^wpe$|^rope$|^freqs"
)
_EXPERT = re.compile(r"experts?(_|$|\d)")
_CONV = re.compile(r"^(short_?)?conv(_?\d*d?|_in|_out)$|conv1d|conv2d|conv_1d")
_SSM = re.compile(r"mamba|ssm|rg_lru|temporal_block|recurrent|^a_log$|^dt_")
_ATTENTION = re.compile(
    r"attn|attention|^(q|k|v|qk|kv|qkv|query|key|value|query_key_value|w[qkv]|wqkv|o|out)(_(proj|lin|linear))?$"
)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|moe|^ff$|intermediate|^output$|densereludense|^fc\d*(_|$)|^lin\d$|^w[123io]$|^wi_\d"
    r"|^(gate|up|down|gate_up)_proj$|_4?h_to_|project(or|ion)"
)
_EMBEDDING = re.compile(
    r"embed|^wte$|^shared$|^(tok|word|char)_emb|^emb$|token_type|patch|(cls|class|mask|dist)_token|^probe$|project_in"
)
_HEAD = re.compile(
    r"head|classif|^score$|^cls$|pooler|predict|embed_out|proj_out|project_out|^output(_layer)?$|logits|vocab_"
    r"|qa_outputs|generator|seq_relationship|^summary"
)
_PARAMETER = frozenset({"weight", "bias", "gamma", "beta", "scale"})


def role_in_layer(suffix: str, dimensions: int, *, ssm_modules: Sequence[str], has_experts: bool) -> Role:
    """Return the role of a tensor inside a layer.

    Args:
        suffix: The name after the layer's index ("self_attn.q_proj.weight").
        dimensions: Number of dimensions of the tensor.
        ssm_modules: Modules of this layer that contain a state-space recurrence, as prefixes of suffixes.
        has_experts: Whether the checkpoint has experts, which makes a module called "gate" a router.
    """
    words = suffix.lower().split(".")
    modules = words[:-1] if words[-1] in _PARAMETER else words
    owner = modules[-1] if modules else ""
    if _NORM.search(owner):
        return "norm"
    if any(_POSITION.search(word) for word in modules):
        return "position"
    if any("router" in word or word == "e_score_correction_bias" for word in words):
        return "router"
    if has_experts and any(word == "gate" or word.endswith("expert_gate") for word in modules):
        return "router"
    if any(_EXPERT.search(word) for word in words) or (dimensions == 3 and any("moe" in word for word in words)):
        return "expert"
    if any(_CONV.search(word) for word in modules):
        return "conv"
    if any(suffix.startswith(module + ".") for module in ssm_modules) or any(_SSM.search(word) for word in words):
        return "ssm"
    return _attention_or_mlp(words)


def _attention_or_mlp(words: Sequence[str]) -> Role:
    # The outermost module decides: "attention.output.dense" is attention, "feed_forward.key" is not.
    for word in words:
        if _ATTENTION.search(word):
            return "attention"
        if _MLP.search(word):
            return "mlp"
    return "other"


def outside_role(name: str, *, side: bool) -> Role:
    """Return the role of a tensor outside all layers.

    Args:
        name: The whole name.
        side: Whether it belongs to a tower, such as a vision encoder, where a "head" is a pooling block.
    """
    words = name.lower().split(".")
    modules = words[:-1] if len(words) > 1 and words[-1] in _PARAMETER else words
    if _NORM.search(modules[-1]):
        return "norm"
    if any(_POSITION.search(word) for word in modules):
        return "position"
    if any(_EXPERT.search(word) for word in words):
        return "expert"
    if side and (role := _attention_or_mlp(words)) != "other" and not any("embed" in word for word in words):
        return role
    if any(_HEAD.search(word) for word in modules) and modules[-1] != "probe":
        return "head"
    if any(_EMBEDDING.search(word) for word in modules):
        return "embedding"
    if any(_CONV.search(word) for word in modules):
        return "conv"
    # "decoder.weight" and "decoder.bias" at the top level are ModernBERT's output matrix.
    if modules == ["decoder"]:
        return "head"
    return _attention_or_mlp(words)


def outside_position(name: str, role: Role, *, side: bool) -> Position:
    """Return whether a tensor outside the layers is used before or after them."""
    lower = name.lower()
    if _BEHIND.search(lower):
        return "after"
    if side or role in ("embedding", "position", "conv"):
        return "before"
    if role == "head":
        return "after"
    return "before" if re.search(r"(^|[._])emb", lower) else "after"
