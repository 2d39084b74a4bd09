"""Tables from the tokens of one vocabulary to those of another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..vocabulary import Vocabulary
from .edit_distance import Nearest

__all__ = ["Table", "byte_table", "edit_table", "table_of"]

Table = NDArray[np.int64]
"""For each token of the source the token of the target, -1 for none; int64, shape [tokens of the source]."""


def byte_table(source: Vocabulary, target: Vocabulary) -> Table:
    """Map each token to the target's token of the same bytes, else to the longest one that its bytes begin with.

    A model that is to write the bytes of the source's token writes that one first. Special tokens go to those of the same
    name, else to the one that begins or ends a text if they do.
    """
    by_bytes = _by_bytes(target)
    longest = max(map(len, by_bytes), default=0)

    def find(number: int) -> int:
        token = source.tokens[number] or b""
        for size in range(min(len(token), longest), 0, -1):
            if (found := by_bytes.get(token[:size])) is not None:
                return found
        return -1

    return table_of(source, target, find)


def edit_table(source: Vocabulary, target: Vocabulary, advance: Callable[[int, int], None] | None = None) -> Table:
    """Map each token to the target's token of the same bytes, else to the one that fewest edits lead to (MinED).

    Args:
        source: Vocabulary of the source.
        target: Vocabulary of the model that is taught.
        advance: Called with the number of tokens that are done, and of all.
    """
    by_bytes = _by_bytes(target)
    nearest = Nearest(target.tokens)
    known: dict[bytes, int] = {}
    # the search takes time for tokens that the target lacks
    wanted = len({token for token in source.tokens if token and token not in by_bytes})

    def find(number: int) -> int:
        token = source.tokens[number] or b""
        if token not in known:
            known[token] = nearest.find(token)
            if advance is not None:
                advance(len(known), wanted)
        return known[token]

    return table_of(source, target, find)


def _by_bytes(target: Vocabulary) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for number, token in enumerate(target.tokens):
        if token:
            found.setdefault(token, number)
    return found


def table_of(source: Vocabulary, target: Vocabulary, find: Callable[[int], int]) -> Table:
    """Map each token to the target's token of the same bytes, else to what `find` returns for its number.

    Special tokens go to those of the same name, else to the one that begins or ends a text if they do.
    """
    by_bytes = _by_bytes(target)
    if source == target:
        return np.arange(len(source), dtype=np.int64)
    table = np.full(len(source), -1, np.int64)
    for number, token in enumerate(source.tokens):
        if not token:
            continue
        if number < len(target) and target.tokens[number] == token:
            # of several tokens with these bytes the one with the same number
            table[number] = number
        else:
            equal = by_bytes.get(token)
            table[number] = find(number) if equal is None else equal
    for role, number in source.roles.items():
        table[number] = target.roles.get(role, -1)
    for name, number in source.special.items():
        if name in target.special:
            table[number] = target.special[name]
    return table
