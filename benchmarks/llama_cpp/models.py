"""Small models to merge: the shipped zoo of SmolLM2-135M, and random ones whose rows are as K types need them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..zoo import default_folder

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Family:
    """Models that can be merged.

    Args:
        name: Its name in the results.
        models: Folders of safetensors, the base first.
    """

    name: str
    models: Sequence[Path]

    @property
    def recipe(self) -> dict[str, Any]:
        """Their average."""
        return {
            "merge_method": "linear",
            "models": [{"model": str(path)} for path in self.models],
            "parameters": {"weight": 1},
        }


def zoo() -> Path:
    """Return the folder of the shipped zoo.

    Raises:
        FileNotFoundError: It was not unpacked.
    """
    found = default_folder("shipped")
    if not (found / "base" / "model.safetensors").exists():
        raise FileNotFoundError(f"{found}: not there; scripts/demo makes it")
    return found


def smollm2() -> Family:
    """Return the base and two fine-tunes of the shipped zoo."""
    place = zoo()
    return Family("SmolLM2-135M", [place / "base", place / "experts" / "maths", place / "experts" / "haskell"])


def wide(folder: Path, *, tied: bool) -> Family:
    """Make two random models of 16 layers whose rows are multiples of 256, with SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    name = "random, tied" if tied else "random"
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.06,
        dtype="float32",
    )
    places = []
    for seed in range(2):
        place = folder / name.replace(", ", "-") / str(seed)
        places.append(place)
        if (place / "config.json").exists():
            continue
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(place)
        for file in _TOKENIZER:
            shutil.copyfile(zoo() / "base" / file, place / file)
    return Family(name, places)


def mixture_recipe(experts: Sequence[Path], architecture: str) -> dict[str, Any]:
    """Return a recipe of `merganser mix` with random routers."""
    found: dict[str, Any] = {
        "base_model": str(experts[0]),
        "experts": [{"source_model": str(path)} for path in experts],
        "architecture": architecture,
        "gate_mode": "random",
    }
    if architecture == "qwen2_moe":
        found["shared_experts"] = [{"source_model": str(experts[0])}]
    return found
