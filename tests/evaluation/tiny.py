"""Tiny Llamas with a byte-level tokenizer, and literal calculations that share no code with the package."""

from __future__ import annotations

import hashlib
import json
import math
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.shared import copied

SENTENCE = "the cat sat on a mat while größere Häuser naïve café 東京 run def return x = 1 ; and then it was"
WORDS = SENTENCE.split()
VOCABULARY = 300


def text(seed: int, words: int = 400) -> str:
    """Words in random order, with letters of one to three bytes."""
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "\n"


@lru_cache
def tokenizer_json(bos: bool) -> str:
    """A byte-level BPE tokenizer; with `bos` it puts a token in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(9, 2000)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer.to_str()


def add_tokenizer(folder: Path, bos: bool = False) -> None:
    (folder / "tokenizer.json").write_text(tokenizer_json(bos))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_model(folder: Path, seed: int, *, bos: bool = False, like: Path | None = None, **config: Any) -> Path:
    """Write a Llama of 28 K parameters; `like` another one, it is a small step away from it."""
    settings = {
        "vocab_size": VOCABULARY + 20,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | config
    near = None if like is None else hashlib.sha256((like / "model.safetensors").read_bytes()).hexdigest()

    def write(made: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        if like is not None:
            base = load_file(like / "model.safetensors")
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(base[name] + 0.02 * torch.randn(parameter.shape))
        model.save_pretrained(made)
        add_tokenizer(made, bos)

    return copied(folder, f"llama {seed} {bos} {near} {settings}", write)


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def nats(model: Any, ids: list[int], position: int) -> float:
    """-log p of ids[position], given all before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:position]])).logits[0, -1].double()
    return -torch.log_softmax(logits, -1)[ids[position]].item()


def literal_bits_per_byte(folder: Path, content: str, context: int, stride: int) -> tuple[float, float]:
    """Bits per byte and next-token accuracy: one token after another, each from a forward pass of its own."""
    model, tokenizer = load(folder)
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    prefix = tokenizer(content)["input_ids"][: len(tokenizer(content)["input_ids"]) - len(ids)]
    room = context - len(prefix)
    total, right = 0.0, 0
    scored = range(0 if prefix else 1, len(ids))
    for position in scored:
        # the first window ends behind token `room`, the others every `stride` tokens later
        end = room + 1
        while end <= position:
            end += stride
        end = min(end, len(ids))
        seen = [*prefix, *ids[max(0, end - 1 - room) : position]]
        total += nats(model, [*seen, ids[position]], len(seen))
        with torch.no_grad():
            right += int(model(torch.tensor([seen])).logits[0, -1].argmax().item() == ids[position])
    nbytes = len(content.encode()) - (0 if prefix else len(tokenizer.decode(ids[:1]).encode()))
    return total / math.log(2) / nbytes, right / len(scored)


def literal_choice(folder: Path, context: str, choice: str) -> float:
    """Log-likelihood of a choice behind a context, token by token; the context does not end in white space."""
    model, tokenizer = load(folder)
    before = tokenizer(context)["input_ids"]
    whole = tokenizer(context + choice)["input_ids"]
    assert whole[: len(before)] == before
    return -sum(nats(model, whole, position) for position in range(len(before), len(whole)))
