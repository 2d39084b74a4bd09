"""The defaults of transformers' config classes for settings that a config.json omits.

Only settings that change what the model computes, and only common classes, are listed. For other classes, a setting
that one of two configs omits is reported as unknown. A test compares the table with the installed transformers;
importing transformers instead would add a second to every merge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .config import KNOWN_TYPES, words

__all__ = ["MODEL_TYPES", "NEUTRAL", "class_defaults", "is_known_type", "same_code"]

NEUTRAL: Mapping[str, Any] = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), 1.0),
    **dict.fromkeys(("routed_scaling_factor", "partial_rotary_factor", "lm_head_multiplier"), 1.0),
    **dict.fromkeys(("n_group", "topk_group", "decoder_sparse_step", "moe_layer_freq"), 1),
    "position_embedding_type": "absolute",
    "scale_attn_weights": True,
}
"""Values that have the same effect as an absent setting."""

# Model types that share one class, or whose classes compute the same function from the same settings.
_SAME_CODE = (
    words("llama mistral code_llama yi"),
    words("roberta xlm-roberta camembert"),
    words("gpt2 gpt-sw3"),
    words("t5 mt5"),
    words("deepseek_v3 kimi_k2"),
)
_SUFFIXES = ("_text_model", "_text")

_TABLE = {
    "llama": (
        "hidden_act=silu hidden_size=4096 max_position_embeddings=2048 num_attention_heads=32 rms_norm_eps=1e-06 "
        "rope_theta=10000.0"
    ),
    "mistral": (
        "hidden_act=silu hidden_size=4096 max_position_embeddings=131072 num_attention_heads=32 "
        "num_key_value_heads=8 rms_norm_eps=1e-06 rope_theta=10000.0 sliding_window=4096"
    ),
    "mixtral": (
        "hidden_act=silu hidden_size=4096 max_position_embeddings=131072 num_attention_heads=32 "
        "num_experts_per_tok=2 num_key_value_heads=8 rms_norm_eps=1e-05 rope_theta=1000000.0"
    ),
    "qwen2": (
        "hidden_act=silu hidden_size=4096 max_position_embeddings=32768 num_attention_heads=32 "
        "num_key_value_heads=32 rms_norm_eps=1e-06 rope_theta=10000.0"
    ),
    "qwen2_moe": (
        "hidden_act=silu hidden_size=2048 max_position_embeddings=32768 num_attention_heads=16 "
        "num_experts_per_tok=4 num_key_value_heads=16 rms_norm_eps=1e-06 rope_theta=10000.0"
    ),
    "qwen3": (
        "head_dim=128 hidden_act=silu hidden_size=4096 max_position_embeddings=32768 num_attention_heads=32 "
        "num_key_value_heads=32 rms_norm_eps=1e-06 rope_theta=10000.0"
    ),
    "qwen3_moe": (
        "hidden_act=silu hidden_size=2048 max_position_embeddings=32768 num_attention_heads=32 "
        "num_experts_per_tok=8 num_key_value_heads=4 rms_norm_eps=1e-06 rope_theta=10000.0"
    ),
    "qwen3_next": (
        "head_dim=256 hidden_act=silu hidden_size=2048 linear_key_head_dim=128 linear_num_key_heads=16 "
        "linear_num_value_heads=32 linear_value_head_dim=128 max_position_embeddings=32768 norm_topk_prob=true "
        "num_attention_heads=16 num_experts_per_tok=10 num_key_value_heads=2 partial_rotary_factor=0.25 "
        "rms_norm_eps=1e-06 rope_theta=10000.0"
    ),
    "gemma": (
        "head_dim=256 hidden_act=gelu_pytorch_tanh hidden_size=3072 max_position_embeddings=8192 "
        "num_attention_heads=16 num_key_value_heads=16 rms_norm_eps=1e-06 rope_theta=10000.0"
    ),
    "gemma2": (
        "attn_logit_softcapping=50.0 final_logit_softcapping=30.0 head_dim=256 "
        "hidden_activation=gelu_pytorch_tanh hidden_size=2304 max_position_embeddings=8192 num_attention_heads=8 "
        "num_key_value_heads=4 query_pre_attn_scalar=256 rms_norm_eps=1e-06 rope_theta=10000.0 "
        "sliding_window=4096"
    ),
    "gemma3_text": (
        "head_dim=256 hidden_activation=gelu_pytorch_tanh hidden_size=2304 max_position_embeddings=131072 "
        "num_attention_heads=8 num_key_value_heads=4 query_pre_attn_scalar=256 rms_norm_eps=1e-06 "
        "rope_local_base_freq=10000.0 rope_theta=1000000.0 sliding_window=4096"
    ),
    "phi": (
        "hidden_act=gelu_new hidden_size=2048 layer_norm_eps=1e-05 max_position_embeddings=2048 "
        "num_attention_heads=32 partial_rotary_factor=0.5 rope_theta=10000.0"
    ),
    "phi3": (
        "hidden_act=silu hidden_size=3072 max_position_embeddings=4096 num_attention_heads=32 "
        "partial_rotary_factor=1.0 rms_norm_eps=1e-05 rope_theta=10000.0"
    ),
    "phimoe": (
        "hidden_act=silu hidden_size=4096 max_position_embeddings=131072 num_attention_heads=32 "
        "num_experts_per_tok=2 num_key_value_heads=8 rms_norm_eps=1e-05 rope_theta=1000000.0"
    ),
    "gpt2": (
        "activation_function=gelu_new layer_norm_epsilon=1e-05 n_head=12 n_positions=1024 scale_attn_weights=true "
        "summary_proj_to_labels=true summary_type=cls_index summary_use_proj=true"
    ),
    "gpt_neo": (
        "activation_function=gelu_new hidden_size=2048 layer_norm_epsilon=1e-05 max_position_embeddings=2048 "
        "num_heads=16 window_size=256"
    ),
    "gpt_neox": (
        "hidden_act=gelu hidden_size=6144 layer_norm_eps=1e-05 max_position_embeddings=2048 "
        "num_attention_heads=64 partial_rotary_factor=0.25 rope_theta=10000.0 use_parallel_residual=true"
    ),
    "gptj": "activation_function=gelu_new layer_norm_epsilon=1e-05 n_head=16 n_positions=2048 rotary_dim=64",
    "codegen": ("activation_function=gelu_new layer_norm_epsilon=1e-05 n_head=16 n_positions=2048 rotary_dim=64"),
    "opt": (
        "activation_function=relu do_layer_norm_before=true hidden_size=768 max_position_embeddings=2048 "
        "num_attention_heads=12"
    ),
    "bloom": "hidden_size=64 layer_norm_epsilon=1e-05 n_head=8",
    "falcon": (
        "activation=gelu hidden_size=4544 layer_norm_epsilon=1e-05 max_position_embeddings=2048 multi_query=true "
        "num_attention_heads=71 parallel_attn=true rope_theta=10000.0"
    ),
    "stablelm": (
        "hidden_act=silu hidden_size=2560 layer_norm_eps=1e-05 max_position_embeddings=4096 "
        "num_attention_heads=32 num_key_value_heads=32 partial_rotary_factor=0.25 rope_theta=10000.0"
    ),
    "starcoder2": (
        "hidden_act=gelu_pytorch_tanh hidden_size=3072 max_position_embeddings=4096 norm_epsilon=1e-05 "
        "num_attention_heads=24 num_key_value_heads=2 rope_theta=10000.0"
    ),
    "olmo": ("hidden_act=silu hidden_size=4096 max_position_embeddings=2048 num_attention_heads=32 rope_theta=10000.0"),
    "olmo2": (
        "hidden_act=silu hidden_size=4096 max_position_embeddings=2048 num_attention_heads=32 rms_norm_eps=1e-05 "
        "rope_theta=10000.0"
    ),
    "olmo3": (
        "hidden_act=silu hidden_size=4096 max_position_embeddings=2048 num_attention_heads=32 rms_norm_eps=1e-05 "
        "rope_theta=500000.0 sliding_window=4096"
    ),
    "olmoe": (
        "hidden_act=silu hidden_size=2048 max_position_embeddings=4096 num_attention_heads=16 "
        "num_experts_per_tok=8 rms_norm_eps=1e-05 rope_theta=10000.0"
    ),
    "cohere": (
        "hidden_act=silu hidden_size=8192 layer_norm_eps=1e-05 logit_scale=0.0625 max_position_embeddings=8192 "
        "num_attention_heads=64 rope_theta=500000.0"
    ),
    "cohere2": (
        "hidden_act=silu hidden_size=8192 layer_norm_eps=1e-05 logit_scale=0.0625 max_position_embeddings=8192 "
        "num_attention_heads=64 rope_theta=10000.0 sliding_window=4096"
    ),
    "granite": (
        "attention_multiplier=1.0 embedding_multiplier=1.0 hidden_act=silu hidden_size=4096 logits_scaling=1.0 "
        "max_position_embeddings=2048 num_attention_heads=32 residual_multiplier=1.0 rms_norm_eps=1e-06 "
        "rope_theta=10000.0"
    ),
    "granitemoe": (
        "attention_multiplier=1.0 embedding_multiplier=1.0 hidden_act=silu hidden_size=4096 logits_scaling=1.0 "
        "max_position_embeddings=2048 num_attention_heads=32 num_experts_per_tok=2 residual_multiplier=1.0 "
        "rms_norm_eps=1e-06 rope_theta=10000.0"
    ),
    "granitemoeshared": (
        "attention_multiplier=1.0 embedding_multiplier=1.0 hidden_act=silu hidden_size=4096 logits_scaling=1.0 "
        "max_position_embeddings=2048 num_attention_heads=32 num_experts_per_tok=2 residual_multiplier=1.0 "
        "rms_norm_eps=1e-06 rope_theta=10000.0"
    ),
    "deepseek_v2": (
        "hidden_act=silu hidden_size=4096 max_position_embeddings=2048 num_attention_heads=32 qk_head_dim=192 "
        "qk_nope_head_dim=128 qk_rope_head_dim=64 rms_norm_eps=1e-06 rope_theta=10000.0 routed_scaling_factor=1.0 "
        "topk_method=greedy v_head_dim=128"
    ),
    "deepseek_v3": (
        "hidden_act=silu hidden_size=7168 max_position_embeddings=4096 n_group=8 norm_topk_prob=true "
        "num_attention_heads=128 num_experts_per_tok=8 num_key_value_heads=128 qk_head_dim=192 "
        "qk_nope_head_dim=128 qk_rope_head_dim=64 rms_norm_eps=1e-06 rope_interleave=true rope_theta=10000.0 "
        "routed_scaling_factor=2.5 topk_group=4 v_head_dim=128"
    ),
    "gpt_oss": (
        "head_dim=64 hidden_act=silu hidden_size=2880 max_position_embeddings=131072 num_attention_heads=64 "
        "num_experts_per_tok=4 num_key_value_heads=8 rms_norm_eps=1e-05 rope_theta=150000.0 sliding_window=128 "
        "swiglu_alpha=1.702 swiglu_limit=7.0"
    ),
    "smollm3": (
        "hidden_act=silu hidden_size=2048 max_position_embeddings=32768 no_rope_layer_interval=4 "
        "num_attention_heads=16 num_key_value_heads=4 rms_norm_eps=1e-06 rope_theta=2000000.0"
    ),
    "glm": (
        "head_dim=128 hidden_act=silu hidden_size=4096 max_position_embeddings=131072 num_attention_heads=32 "
        "num_key_value_heads=2 partial_rotary_factor=0.5 rms_norm_eps=1.5625e-07 rope_theta=10000.0"
    ),
    "glm4": (
        "head_dim=128 hidden_act=silu hidden_size=4096 max_position_embeddings=131072 num_attention_heads=32 "
        "num_key_value_heads=2 partial_rotary_factor=0.5 rms_norm_eps=1.5625e-07 rope_theta=10000.0"
    ),
    "glm4_moe": (
        "hidden_act=silu hidden_size=4096 max_position_embeddings=131072 n_group=1 norm_topk_prob=true "
        "num_attention_heads=96 num_experts_per_tok=8 num_key_value_heads=8 partial_rotary_factor=0.5 "
        "rms_norm_eps=1e-05 rope_theta=10000.0 routed_scaling_factor=1.0 topk_group=1"
    ),
    "ernie4_5": (
        "head_dim=128 hidden_act=silu hidden_size=1024 max_position_embeddings=131072 num_attention_heads=16 "
        "num_key_value_heads=2 rms_norm_eps=1e-05 rope_theta=500000.0"
    ),
    "exaone4": (
        "hidden_act=silu hidden_size=4096 max_position_embeddings=2048 num_attention_heads=32 "
        "num_key_value_heads=32 rms_norm_eps=1e-05 rope_theta=10000.0 sliding_window=4096 "
        "sliding_window_pattern=4"
    ),
    "nemotron": (
        "hidden_act=relu2 hidden_size=6144 max_position_embeddings=4096 norm_eps=1e-05 num_attention_heads=48 "
        "partial_rotary_factor=0.5 rope_theta=10000.0"
    ),
    "apertus": (
        "hidden_act=xielu hidden_size=4096 max_position_embeddings=65536 num_attention_heads=32 "
        "rms_norm_eps=1e-05 rope_theta=12000000.0"
    ),
    "bert": ("hidden_act=gelu hidden_size=768 layer_norm_eps=1e-12 max_position_embeddings=512 num_attention_heads=12"),
    "roberta": (
        "hidden_act=gelu hidden_size=768 layer_norm_eps=1e-12 max_position_embeddings=512 num_attention_heads=12"
    ),
    "xlm-roberta": (
        "hidden_act=gelu hidden_size=768 layer_norm_eps=1e-12 max_position_embeddings=512 num_attention_heads=12"
    ),
    "camembert": (
        "hidden_act=gelu hidden_size=768 layer_norm_eps=1e-12 max_position_embeddings=512 num_attention_heads=12"
    ),
    "electra": (
        "hidden_act=gelu hidden_size=256 layer_norm_eps=1e-12 max_position_embeddings=512 num_attention_heads=4 "
        "summary_activation=gelu summary_type=first summary_use_proj=true"
    ),
    "distilbert": "activation=gelu max_position_embeddings=512 n_heads=12",
    "albert": (
        "hidden_act=gelu_new hidden_size=4096 layer_norm_eps=1e-12 max_position_embeddings=512 num_attention_heads=64"
    ),
    "modernbert": (
        "classifier_activation=gelu classifier_pooling=cls hidden_activation=gelu hidden_size=768 "
        "local_attention=128 max_position_embeddings=8192 norm_eps=1e-05 num_attention_heads=12 "
        "rope_local_base_freq=10000.0 rope_theta=160000.0"
    ),
    "deberta-v2": (
        "hidden_act=gelu hidden_size=1536 layer_norm_eps=1e-07 max_position_embeddings=512 num_attention_heads=24 "
        "pooler_hidden_act=gelu position_biased_input=true"
    ),
    "t5": "d_kv=64 feed_forward_proj=relu layer_norm_epsilon=1e-06 num_heads=8 relative_attention_max_distance=128",
    "mt5": (
        "d_kv=64 feed_forward_proj=gated-gelu layer_norm_epsilon=1e-06 num_heads=6 relative_attention_max_distance=128"
    ),
    "bart": (
        "activation_function=gelu decoder_attention_heads=16 encoder_attention_heads=16 max_position_embeddings=1024"
    ),
    "mbart": (
        "activation_function=gelu decoder_attention_heads=16 encoder_attention_heads=16 max_position_embeddings=1024"
    ),
    "whisper": "activation_function=gelu decoder_attention_heads=6 encoder_attention_heads=6",
    "qwen2_vl_text": (
        "hidden_act=silu hidden_size=8192 max_position_embeddings=32768 num_attention_heads=64 "
        "num_key_value_heads=8 rms_norm_eps=1e-05 rope_theta=1000000.0"
    ),
    "qwen2_5_vl_text": (
        "hidden_act=silu hidden_size=8192 max_position_embeddings=32768 num_attention_heads=64 "
        "num_key_value_heads=8 rms_norm_eps=1e-05 rope_theta=1000000.0"
    ),
    "llama4_text": (
        "attention_chunk_size=8192 attn_scale=0.1 attn_temperature_tuning=true floor_scale=8192 head_dim=128 "
        "hidden_act=silu hidden_size=5120 max_position_embeddings=131072 no_rope_layer_interval=4 "
        "num_attention_heads=40 num_experts_per_tok=1 num_key_value_heads=8 rms_norm_eps=1e-05 "
        "rope_theta=500000.0 use_qk_norm=true"
    ),
    "mllama_text_model": (
        "hidden_act=silu hidden_size=4096 max_position_embeddings=131072 num_attention_heads=32 "
        "num_key_value_heads=8 rms_norm_eps=1e-05 rope_theta=500000.0"
    ),
    "clip_vision_model": "hidden_act=quick_gelu hidden_size=768 layer_norm_eps=1e-05 num_attention_heads=12",
    "clip_text_model": (
        "hidden_act=quick_gelu hidden_size=512 layer_norm_eps=1e-05 max_position_embeddings=77 num_attention_heads=8"
    ),
    "siglip_vision_model": ("hidden_act=gelu_pytorch_tanh hidden_size=768 layer_norm_eps=1e-06 num_attention_heads=12"),
    "vit": "hidden_act=gelu hidden_size=768 layer_norm_eps=1e-12 num_attention_heads=12 pooler_act=tanh",
    "pixtral": "hidden_act=gelu hidden_size=1024 num_attention_heads=16 rope_theta=10000.0",
}

MODEL_TYPES = tuple(_TABLE)
"""The model types whose defaults are known."""


def same_code(first: str, second: str) -> bool:
    """Return whether two model types compute the same function from the same settings."""
    first, second = _plain(first), _plain(second)
    return first == second or any(first in group and second in group for group in _SAME_CODE)


def is_known_type(model_type: str) -> bool:
    """Return whether a model type is one of transformers'; two such types differ in code unless `same_code` holds."""
    plain = _plain(model_type)
    return any(name in _TABLE or name in KNOWN_TYPES for name in (model_type, plain))


def _plain(model_type: str) -> str:
    """Return a model type without the suffix that it has as part of a larger model, such as `_text`."""
    for suffix in _SUFFIXES:
        model_type = model_type.removesuffix(suffix)
    return model_type


def class_defaults(model_type: object) -> Mapping[str, Any]:
    """Return the defaults of a model type's config class; empty for a type that is not listed."""
    if not isinstance(model_type, str):
        return {}
    text = _TABLE.get(model_type) or _TABLE.get(_plain(model_type), "")
    pairs = (pair.partition("=") for pair in text.split())
    return {key: _value(value) for key, _, value in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
