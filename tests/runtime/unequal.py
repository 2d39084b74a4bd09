"""Three tiny experts that differ in width, depth, rows of the vocabulary, ties and family, and mixtures of them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from merganser.inference.language_model import open_model
from merganser.inference.stored import open_stored
from merganser.runtime.routed.unequal import MixtureSettings, UnequalModel
from tests.evaluation.tiny import add_tokenizer, make_model
from tests.shared import copied

TEXTS = {
    "a": "the cat sat on a mat and then it was ",
    "b": "größere Häuser naïve café 東京 ",
    "c": "def return x = 1 ; def run x = 1 ; ",
}
LISTS = {name: [text] for name, text in TEXTS.items()}
IDS = torch.tensor([[5, 9, 30, 41, 77, 8], [7, 100, 3, 60, 12, 9]])
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def make_gpt2(folder: Path) -> Path:
    """A model of another family, with a table of positions."""

    def write(made: Path) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(3)
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 48, "initializer_range": 0.4}
        GPT2LMHeadModel(GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=1, **sizes)).save_pretrained(made)
        add_tokenizer(made)

    return copied(folder, "gpt2 for unequal experts", write)


def make_experts(folder: Path) -> Path:
    """Write the experts, and a text for each."""
    make_model(folder / "experts" / "a", 1)
    make_model(
        folder / "experts" / "b", 2, hidden_size=24, num_hidden_layers=3, vocab_size=310, tie_word_embeddings=True
    )
    make_gpt2(folder / "experts" / "c")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text * 12, encoding="utf-8")
    return folder


@lru_cache
def loaded(folder: Path) -> Any:
    found = open_model(open_stored(folder))
    return found.load(found.source.read(), torch.float32, torch.device("cpu"))


def made(out: Path, by: str = "router", embeddings: str = "own", top: int | None = 1) -> UnequalModel:
    """A mixture whose router has random weights, large enough that texts get other weights."""
    model = UnequalModel(out, MixtureSettings(by, embeddings, top))
    if by == "router":
        draw = torch.Generator().manual_seed(5)
        width = model.model.read(IDS, torch.ones_like(IDS)).shape[-1]
        count = len(model.tasks)
        model.model.router = (3 * torch.randn(count, width, generator=draw), torch.randn(count, generator=draw))
    return model


opened = lru_cache(made)
"""The same, for tests that do not change it."""
