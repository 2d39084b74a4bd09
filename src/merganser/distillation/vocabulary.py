"""The tokens of a vocabulary as bytes, and the special ones by name; kept in the folder of a logit cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Vocabulary"]

_UNKNOWN, _TEXT, _SPECIAL = 0, 1, 2
_WHITE = (b" ", b"\t", b"\n")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    Args:
        tokens: The bytes of each token; none for a special one, None where they are not known.
        special: Special tokens by name.
        roles: Those of them that begin or end a text, by `bos` and `eos`.
    """

    tokens: tuple[bytes | None, ...]
    special: Mapping[str, int] = field(default_factory=dict)
    roles: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def begin_words(self, size: int) -> NDArray[np.bool_]:
        """Return which tokens begin a word: with a space, a tab or a line break, or as special tokens do.

        Args:
            size: Number of logits; those without a token begin none.
        """
        found = np.zeros(max(size, len(self)), np.bool_)
        found[: len(self)] = [(token or b"")[:1] in _WHITE for token in self.tokens]
        found[[*self.special.values()]] = True
        return found[:size]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the tokens as arrays: `bytes` (uint8), `ends` (int64) and `kinds` (uint8)."""
        ends = np.cumsum([len(token or b"") for token in self.tokens], dtype=np.int64)
        special = {*self.special.values()}
        kinds = [
            _UNKNOWN if token is None else _SPECIAL if number in special else _TEXT
            for number, token in enumerate(self.tokens)
        ]
        text = b"".join(token or b"" for token in self.tokens)
        return {"bytes": np.frombuffer(text, np.uint8), "ends": ends, "kinds": np.array(kinds, np.uint8)}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], special: Mapping[str, int], roles: Mapping[str, int]
    ) -> Vocabulary:
        """Return the vocabulary that `to_arrays` stored.

        Raises:
            ValueError: The arrays do not fit each other.
        """
        text, ends, kinds = arrays["bytes"].tobytes(), arrays["ends"], arrays["kinds"]
        if len(ends) != len(kinds) or (np.diff(ends, prepend=0) < 0).any() or (len(ends) and ends[-1] != len(text)):
            raise ValueError("the tokens do not fit each other")
        tokens = tuple(
            None if kind == _UNKNOWN else text[start:end]
            for kind, (start, end) in zip(kinds.tolist(), pairwise([0, *ends.tolist()]), strict=True)
        )
        return cls(tokens, dict(special), dict(roles))
