"""Which tokens end a text, or a turn of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..jsonfile import read_object

__all__ = ["end_token", "turn_ends"]

# Tokens that published chat templates write after an assistant's turn.
_TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end_of_turn|>", "<|endofturn|>"),
    *("[|endofturn|]", "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<|return|>", "<|end|>"),
    "<｜end▁of▁sentence｜>",
)
# In a template that contains the key, the value ends only parts of an answer, not the whole answer.
_ENDS_PARTS = {"<|return|>": "<|end|>"}


def end_token(files: Mapping[str, Path]) -> str | None:
    """Return the end-of-sequence token in a tokenizer's config; None if there is none.

    Args:
        files: The files of the tokenizer by name.

    Raises:
        CheckpointError: A file is damaged.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in files:
            token = read_object(files[name]).get("eos_token")
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                return content
    return None


def turn_ends(template: str) -> list[str]:
    """Return the tokens in a chat template's text that end a turn."""
    found = [token for token in _TURN_ENDS if token in template]
    inner = [part for whole, part in _ENDS_PARTS.items() if whole in found]
    return [token for token in found if token not in inner]
