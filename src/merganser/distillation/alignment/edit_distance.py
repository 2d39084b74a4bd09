"""MinED: for each token of one vocabulary the token of another one that fewest edits lead to (FuseLLM)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Nearest", "edit_distances"]

_WORD = 64


class Nearest:
    """Tokens, to find those that are nearest to others by edit distance: insertions, deletions and replacements of bytes.

    Args:
        tokens: Their bytes; None for a token that is never an answer.
    """

    def __init__(self, tokens: Sequence[bytes | None]) -> None:
        by_length: dict[int, list[int]] = {}
        for number, token in enumerate(tokens):
            if token:
                by_length.setdefault(len(token), []).append(number)
        self._groups = {
            length: (
                np.array(numbers),
                np.frombuffer(b"".join(tokens[i] or b"" for i in numbers), np.uint8).reshape(-1, length),
            )
            for length, numbers in by_length.items()
        }

    def find(self, token: bytes) -> int:
        """Return the index of the nearest token, of several the first one; -1 if there are none.

        Tokens whose length differs by more than the best distance so far are not looked at.
        """
        best, found = 1 << 30, -1
        for length in sorted(self._groups, key=lambda own: (abs(own - len(token)), own)):
            if abs(length - len(token)) > best:
                break
            numbers, letters = self._groups[length]
            distances = edit_distances(token, letters)
            nearest = int(distances.argmin())
            candidate = (int(distances[nearest]), int(numbers[nearest]))
            if found < 0 or candidate < (best, found):
                best, found = candidate
        return found


def edit_distances(pattern: bytes, texts: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the edit distance of one text to each of many of one length.

    Columns of the table of distances are held as bits of a word, one per byte of the pattern (Myers, 1999, with Hyyrö's
    form for the distance of whole texts); a pattern of more than 64 bytes is computed row by row.

    Args:
        pattern: The text.
        texts: Bytes, shape [texts, length].

    Returns:
        Shape [texts].
    """
    count, length = texts.shape
    if not pattern:
        return np.full(count, length, np.int64)
    if len(pattern) > _WORD:
        return _by_rows(pattern, texts)
    one, high = np.uint64(1), np.uint64(len(pattern) - 1)
    masks = np.zeros(256, np.uint64)
    for place, letter in enumerate(pattern):
        masks[letter] |= one << np.uint64(place)
    up = np.full(count, ~np.uint64(0))
    down = np.zeros(count, np.uint64)
    found = np.full(count, len(pattern), np.int64)
    for column in range(length):
        equal = masks[texts[:, column]]
        # where the distance does not grow along the diagonal; the carry of the sum runs down a stretch of equal letters
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right_up, right_down = down | ~(diagonal | up), up & diagonal
        found += (right_up >> high & one).astype(np.int64) - (right_down >> high & one).astype(np.int64)
        right_up, right_down = right_up << one | one, right_down << one
        up, down = right_down | ~(diagonal | right_up), right_up & diagonal
    return found


def _by_rows(pattern: bytes, texts: NDArray[np.uint8]) -> NDArray[np.int64]:
    count, length = texts.shape
    row = np.tile(np.arange(length + 1), (count, 1))
    for number, letter in enumerate(pattern, 1):
        above, row = row, np.empty_like(row)
        row[:, 0] = number
        for column in range(length):
            replaced = above[:, column] + (texts[:, column] != letter)
            row[:, column + 1] = np.minimum(np.minimum(above[:, column + 1], row[:, column]) + 1, replaced)
    return row[:, -1].astype(np.int64)
