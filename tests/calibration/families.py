"""Tiny configs of the architectures that are streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.shared import copied

VOCAB = 320

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(name: str, **keys: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}Config")(**{**_SHAPE, **keys})


_SLIDING = {"sliding_window": 5, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (_config("Llama"), "LlamaForCausalLM"),
    "llama-tied": (_config("Llama", tie_word_embeddings=True), "LlamaForCausalLM"),
    "mistral": (_config("Mistral", sliding_window=5), "MistralForCausalLM"),
    "qwen2": (
        _config("Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2),
        "Qwen2ForCausalLM",
    ),
    "qwen3": (_config("Qwen3", head_dim=8), "Qwen3ForCausalLM"),
    "gemma2": (_config("Gemma2", **_SLIDING), "Gemma2ForCausalLM"),
    "gemma3": (_config("Gemma3Text", **_SLIDING, sliding_window_pattern=3), "Gemma3ForCausalLM"),
    "phi": (_config("Phi", partial_rotary_factor=0.5), "PhiForCausalLM"),
    "phi3": (_config("Phi3"), "Phi3ForCausalLM"),
    "gpt-neox": (_config("GPTNeoX"), "GPTNeoXForCausalLM"),
    "gpt2": (_config("GPT2"), "GPT2LMHeadModel"),
    "olmo2": (_config("Olmo2"), "Olmo2ForCausalLM"),
    "mixtral": (_config("Mixtral", **_EXPERTS, num_local_experts=4), "MixtralForCausalLM"),
    "qwen2-moe": (
        _config("Qwen2Moe", **_EXPERTS, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=32),
        "Qwen2MoeForCausalLM",
    ),
    "qwen3-moe": (
        _config("Qwen3Moe", **_EXPERTS, num_experts=4, moe_intermediate_size=24, head_dim=8),
        "Qwen3MoeForCausalLM",
    ),
    "deepseek-v3": (
        _config(
            "DeepseekV3",
            **_EXPERTS,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            num_key_value_heads=4,
        ),
        "DeepseekV3ForCausalLM",
    ),
    "gpt-oss": (_config("GptOss", **_EXPERTS, **_SLIDING, num_local_experts=4), "GptOssForCausalLM"),
    "bert": (_config("Bert"), "BertForMaskedLM"),
    "roberta": (_config("Roberta"), "RobertaForMaskedLM"),
    "modernbert": (
        _config("ModernBert", local_attention=6, global_attn_every_n_layers=3, cls_token_id=1, sep_token_id=2),
        "ModernBertForMaskedLM",
    ),
    "t5": (
        lambda: transformers.T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        "T5ForConditionalGeneration",
    ),
}


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model with random weights, whose biases and norms are random, too."""
    make, kind = FAMILIES[name]
    config = make()

    def write(made: Path) -> None:
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.to(dtype).save_pretrained(made)

    return copied(folder, f"{kind} {dtype} {config.to_json_string(use_diff=False)}", write)
