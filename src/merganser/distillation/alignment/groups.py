"""Byte groups: the finest pieces of a text that are whole tokens in two tokenizers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Groups", "byte_groups"]

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Groups:
    """Pieces of a text, in its order; all arrays are int64 of shape [groups].

    Args:
        starts: Index of the first token of each piece, in the one tokenizer.
        stops: Index after its last token.
        other_starts: As `starts`, in the other tokenizer.
        other_stops: As `stops`, in the other tokenizer.
        ends: Byte at which the piece ends.
    """

    starts: Indices
    stops: Indices
    other_starts: Indices
    other_stops: Indices
    ends: Indices

    def __len__(self) -> int:
        return len(self.ends)


def byte_groups(ends: ArrayLike, other_ends: ArrayLike) -> Groups:
    """Divide a text at every byte where a token ends in both tokenizers.

    Tokens without bytes (special tokens) are in no group, and neither is what lies behind the last byte where both end. The
    time is linear in bytes and tokens.

    Args:
        ends: For each token the number of bytes up to its end, not decreasing, from 0.
        other_ends: The same for the tokens of the other tokenizer, counted from the same byte.

    Raises:
        ValueError: A list decreases, or has a negative number.
    """
    one, other = _checked(ends), _checked(other_ends)
    own, others = _with_bytes(one), _with_bytes(other)
    length = max([0, *one[-1:].tolist(), *other[-1:].tolist()])
    is_end = np.zeros((2, length + 1), np.bool_)
    is_end[0, one[own]] = True
    is_end[1, other[others]] = True
    common = np.flatnonzero(is_end[0] & is_end[1])
    return Groups(*_ranges(one, own, common), *_ranges(other, others, common), common)


def _checked(ends: ArrayLike) -> Indices:
    found = np.asarray(ends, np.int64).reshape(-1)
    if (np.diff(found, prepend=0) < 0).any():
        raise ValueError("the ends of tokens must not decrease, nor be negative")
    return found


def _with_bytes(ends: Indices) -> Indices:
    """Return the indices of the tokens that have bytes."""
    return np.flatnonzero(np.diff(ends, prepend=0) > 0)


def _ranges(ends: Indices, own: Indices, common: Indices) -> tuple[Indices, Indices]:
    """Return the first token of each group and the one after its last, given the tokens with bytes and the groups' ends."""
    last = np.searchsorted(ends[own], common)
    first = np.concatenate([np.zeros(min(1, len(last)), np.int64), last[:-1] + 1])
    return own[first], own[last] + 1
