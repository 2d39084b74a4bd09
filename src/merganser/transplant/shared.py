"""The tokens that a donor's tokenizer and a model share, whatever way each spells them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.vocabulary.tokens import Tokens
from ..jsonfile import read_object
from ..tokenizer.spelling import Spelling, spelling_of

__all__ = ["shared_rows", "spelling"]

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

Key = tuple[str, object]


def spelling(tokens: Tokens) -> Spelling:
    """Return how a tokenizer spells its tokens.

    Raises:
        UnsupportedError: It has no tokenizer.json.
        CheckpointError: That file is damaged.
    """
    return spelling_of(tokens.document.content)


def shared_rows(donor: Tokens, model: Tokens) -> dict[int, int]:
    """Return the model's row for each of the donor's tokens that the model has, too.

    Ordinary tokens are equal if they stand for the same bytes. Added tokens, such as special ones, are equal if their
    texts are; a special token that the model lacks is taken for the one with the same role there (beginning, end,
    padding, unknown).

    Args:
        donor: The tokenizer that the output gets.
        model: The model's tokens.

    Raises:
        UnsupportedError: One of the two has no tokenizer.json.
        CheckpointError: One of these files is damaged.
    """
    theirs = _keys(model)
    found = {}
    for key, number in _keys(donor).items():
        row = theirs.get(key)
        if row is not None and row < model.rows:
            found[number] = row
    their_roles = _roles(model.files)
    for role, token in _roles(donor.files).items():
        own, counterpart = donor.ids.get(token), model.ids.get(their_roles.get(role, ""))
        if own is not None and own not in found and counterpart is not None and counterpart < model.rows:
            found[own] = counterpart
    return found


def _keys(tokens: Tokens) -> dict[Key, int]:
    """Return the id of each token by what it stands for."""
    document = tokens.document
    how = spelling(tokens)
    keys: dict[Key, int] = {}
    for token, number in document.ids.items():
        data = None if token in document.added else how.read(token)
        keys.setdefault(("added", token) if data is None else ("bytes", data), number)
    return keys


def _roles(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the special token of each role."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content: Mapping[str, Any] = read_object(files[name]) if name in files else {}
        for role in _ROLES:
            token = content.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[role] = token
    return found
