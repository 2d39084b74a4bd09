"""Tiny models of transformers' classes, with a tokenizer: of sizes that vLLM's kernels for processors take."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SENTENCE = "the cat sat on a mat while one two three red green blue run def return x = 1 ; and then it was not so"
WORDS = tuple(_SENTENCE.split())
VOCABULARY = 320

# heads of 32 and widths in whole 32s: vLLM's attention and experts on a processor take no others
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    # far enough apart that the likeliest token is clear
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_PLAIN = {"num_attention_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _PLAIN | {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}}),
    "llama-tied": ("Llama", _PLAIN | {"tie_word_embeddings": True}),
    "llama-wide": (
        "Llama",
        {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 64},
    ),
    "qwen2": ("Qwen2", _PLAIN),
    "qwen3": ("Qwen3", {}),
    "olmo2": ("Olmo2", _PLAIN),
    "mixtral": ("Mixtral", {"num_experts_per_tok": 2, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", _PLAIN | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3Moe", _EXPERTS | {"num_experts": 4}),
    "olmoe": ("Olmoe", _PLAIN | {"num_experts_per_tok": 2, "num_experts": 4}),
    "flex_olmo": ("FlexOlmo", _PLAIN | {"num_experts_per_tok": 2, "num_experts": 3}),
    "deepseek_v3": (
        "DeepseekV3",
        _EXPERTS
        | {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "num_key_value_heads": 4,
        },
    ),
}


def text(seed: int, words: int = 40) -> str:
    """Return words in random order."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write(folder: Path, family: str, seed: int) -> None:
    """Write a model of random weights in float32; models of one family lie near each other."""
    import torch
    import transformers

    kind, keys = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**{**_SHAPE, **keys})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms and biases, which all begin alike, are moved by as much
            parameter.add_((0.1 if "norm" in name or name.endswith("bias") else 0.05) * torch.randn_like(parameter))
    model.save_pretrained(folder)
    _add_tokenizer(folder)


def _add_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 20,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(9, 2000)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def grow(folder: Path, model: Path, tokens: list[str]) -> None:
    """Write a model with tokens added by transformers, their rows random."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    grown = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokenizer.add_tokens(tokens)
    grown.resize_token_embeddings(len(tokenizer))
    grown.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
