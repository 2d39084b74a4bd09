"""The real tensor names of small models of each architecture, built by transformers on the meta device."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPEECH = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "decoder_start_token_id": 1,
    **IDS,
}

# name: (model_type, settings, AutoModelFor...)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    **{
        kind: (kind, TEXT, "CausalLM")
        for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "gpt_neox", "olmo2")
    },
    "stablelm": ("stablelm", TEXT, "CausalLM"),
    "gemma3_text": ("gemma3_text", {**TEXT, "num_hidden_layers": 7, "head_dim": 8}, "CausalLM"),
    "gemma3": (
        "gemma3",
        {
            "text_config": {**TEXT, "num_hidden_layers": 7, "head_dim": 8},
            "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
        },
        "ImageTextToText",
    ),
    "gpt2": ("gpt2", {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **IDS}, "CausalLM"),
    "gpt_neo": (
        "gpt_neo",
        {"vocab_size": 96, "hidden_size": 32, "num_layers": 4, "num_heads": 4, **IDS}
        | {"attention_types": [[["global", "local"], 2]], "max_position_embeddings": 64},
        "CausalLM",
    ),
    "falcon": (
        "falcon",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **IDS},
        "CausalLM",
    ),
    "mamba": (
        "mamba",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, **IDS},
        "CausalLM",
    ),
    "mixtral": ("mixtral", {**TEXT, "num_local_experts": 3}, "CausalLM"),
    "qwen2_moe": (
        "qwen2_moe",
        {**TEXT, **MOE, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
        "CausalLM",
    ),
    "qwen3_moe": ("qwen3_moe", {**TEXT, **MOE, "mlp_only_layers": [1]}, "CausalLM"),
    "deepseek_v3": (
        "deepseek_v3",
        {**TEXT, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
        "CausalLM",
    ),
    "jamba": (
        "jamba",
        {**TEXT, "num_experts": 2, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 4}
        | {"num_hidden_layers": 6, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "CausalLM",
    ),
    "smollm3": ("smollm3", TEXT, "CausalLM"),
    "lfm2": ("lfm2", {**TEXT, "full_attn_idxs": [1, 3]}, "CausalLM"),
    "modernbert": ("modernbert", TEXT, "MaskedLM"),
    "bert": ("bert", TEXT, "MaskedLM"),
    "roberta": ("roberta", TEXT, "MaskedLM"),
    "t5": (
        "t5",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, **IDS},
        "Seq2SeqLM",
    ),
    "whisper": ("whisper", SPEECH, "SpeechSeq2Seq"),
}


@dataclass(frozen=True)
class Real:
    """What transformers says about a model."""

    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    tied: dict[str, str]


def build(name: str, config: Any = None) -> torch.nn.Module:
    """Return the model on the meta device, from the table's settings or from a config object."""
    kind, settings, auto = ARCHITECTURES[name]
    if config is None:
        config = transformers.AutoConfig.for_model(kind, **settings)
    with torch.device("meta"):
        return getattr(transformers, f"AutoModelFor{auto}").from_config(config)


def names_in_memory(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model's tensors, without the names that only repeat another's tensor."""
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


@functools.cache
def real(name: str) -> Real:
    """Return names as the model has them in memory, its config and its ties."""
    model = build(name)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    tied = dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}
    return Real(names_in_memory(model), config, tied)


def published(name: str, folder: Path) -> Real:
    """Return names as `save_pretrained` writes them, which is how checkpoints are published, and the written config."""
    kind, settings, auto = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = getattr(transformers, f"AutoModelFor{auto}").from_config(config)
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    tied = dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}
    return Real(shapes, json.loads((folder / "config.json").read_text()), tied)


def load_config(config: dict[str, Any], folder: Path) -> Any:
    """Return the config object that transformers makes of a config.json with these contents."""
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(folder)
