"""Models whose rows are moved by hand, token by token, as `docs/vocabularies.md` describes it; shares no code with src."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.making import Tensors, llama, llama_config, write_model

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def bpe(tokens: list[str], added: list[str] = [], merges: list[str] = [], **more: Any) -> dict[str, Any]:  # noqa: B006
    """A tokenizer.json; added tokens follow the trained ones."""
    entries = [{"id": len(tokens) + i, "content": token, "special": True, **FLAGS} for i, token in enumerate(added)]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    return {"version": "1.0", "added_tokens": entries, "model": model, **more}


def tokens_of(document: dict[str, Any]) -> dict[str, int]:
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {pair[0]: i for i, pair in enumerate(vocabulary)}
    return vocabulary | {entry["content"]: entry["id"] for entry in document["added_tokens"]}


def model(
    folder: Path, seed: int, document: dict[str, Any] | None, *, rows: int = 32, head: bool = True, **options: Any
) -> Path:
    tensors = llama(seed, vocab=rows, head=head, **options)
    config = llama_config(vocab=rows, tied=not head, hidden=options.get("hidden", 16))
    return write_model(folder, tensors, config, side_files={"tokenizer.json": json.dumps(document)} if document else {})


def moved(
    models: list[tuple[Tensors, dict[str, int]]], out: dict[str, int], rows: int, base: int | None
) -> list[Tensors]:
    """Return the tensors of each model with the rows of the output, computed in float64 where a row is a mean."""
    result = []
    for tensors, ids in models:
        changed = dict(tensors)
        for name in (EMBEDDING, HEAD):
            if name not in tensors:
                continue
            made = torch.zeros(rows, tensors[name].shape[1], dtype=torch.float64)
            for token, row in out.items():
                owners = [(t[name], i[token]) for t, i in models if token in i and i[token] < len(t[name])]
                if token in ids and ids[token] < len(tensors[name]):
                    made[row] = tensors[name][ids[token]].double()
                elif base is not None and token in models[base][1]:
                    made[row] = models[base][0][name][models[base][1][token]].double()
                elif owners:
                    made[row] = torch.stack([t[i].double() for t, i in owners]).mean(0)
                else:
                    named = sorted({i for i in ids.values() if i < len(tensors[name])})
                    made[row] = tensors[name][named].double().mean(0)
            changed[name] = made.float()
        result.append(changed)
    return result
