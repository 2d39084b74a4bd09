"""Held-out loss of a causal language model on a text file."""

import math
from pathlib import Path
from typing import Any, NamedTuple


class Loss(NamedTuple):
    """Mean loss on a text and how much of the text it stands for."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


def held_out_loss(model_dir: Path, text_file: Path, max_tokens: int = 4096, window: int = 128) -> Loss:
    """Next-token loss on the first `max_tokens` tokens of a text, in windows of `window` tokens.

    Windows overlap by one token, so each token but the very first is predicted once. Bits per byte divides by
    the UTF-8 bytes of the predicted tokens, which makes models with different tokenizers comparable.

    Raises:
        ValueError: The text has fewer than two tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return loss_of_text(model, tokenizer, Path(text_file), max_tokens, window)


def loss_of_text(model: Any, tokenizer: Any, text_file: Path, max_tokens: int, window: int) -> Loss:
    """`held_out_loss` of a model that is loaded already."""
    import torch

    # 16 characters a token is more than any text here needs; reading on would only cost time
    text = text_file.read_text(encoding="utf-8")[: 16 * max_tokens]
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    ids, ends = encoded["input_ids"][:max_tokens], [end for _, end in encoded["offset_mapping"][:max_tokens]]
    if len(ids) < 2:
        raise ValueError(f"{text_file}: needs at least 2 tokens, has {len(ids)}")
    nats = 0.0
    with torch.inference_mode():
        for rows in _windows(ids, window):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            ).item()
    tokens = len(ids) - 1
    size = len(text[ends[0] : ends[-1]].encode())
    return Loss(nats / tokens, nats / math.log(2) / size, tokens, size)


def _windows(ids: list[int], window: int, rows: int = 16) -> Any:
    import torch

    starts = range(0, len(ids) - 1, window)
    full = [ids[start : start + window + 1] for start in starts]
    rest = full.pop() if len(full[-1]) < window + 1 else None
    for first in range(0, len(full), rows):
        yield torch.tensor(full[first : first + rows])
    if rest is not None:
        yield torch.tensor([rest])
