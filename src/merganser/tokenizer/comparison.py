"""Compare which token each row of an embedding stands for in two models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .vocabulary import Vocabulary

__all__ = ["Comparison", "Renamed", "compare_vocabularies", "is_placeholder"]

# Rows that are kept free, and padding, which nothing is learnt for.
_PLACEHOLDER = re.compile(
    r"▁?[<\[{|>]+\W*\w*(reserved|unused|placeholder|dummy|extra_id|(special|control|extra|additional)_?\d|pad(_|ding|\W))"
    r"|madeupword\d",
    re.IGNORECASE,
)

_OTHER_VOCABULARY = 0.01
"""Share of ordinary tokens that may be others before two vocabularies are no longer the same one with repairs."""

_OTHER_FILE = 0.1
"""Share of tokens that one of two files for the same tokenizer may lack: special and reserved ones."""


@dataclass(frozen=True, slots=True)
class Renamed:
    """A row that stands for different tokens."""

    id: int
    first: str
    second: str


@dataclass(slots=True)
class Comparison:
    """How two vocabularies differ in the rows that are merged. Rows that are kept free count for nothing.

    Attributes:
        permuted: Rows whose tokens both models have, each at another place.
        replaced: Rows of ordinary tokens that are other ordinary tokens.
        renamed: Rows whose token is called otherwise, where one of the two is special or was kept free.
        only_first: Tokens of rows that the second model has no token for.
        only_second: Tokens of rows that the first model has no token for.
        same: How many rows stand for the same token.
        comparable: False where the two files number their tokens each in its own way, so that nothing can be said.
    """

    permuted: list[Renamed] = field(default_factory=list)
    replaced: list[Renamed] = field(default_factory=list)
    renamed: list[Renamed] = field(default_factory=list)
    only_first: dict[int, str] = field(default_factory=dict)
    only_second: dict[int, str] = field(default_factory=dict)
    same: int = 0
    comparable: bool = True

    @property
    def mergeable(self) -> bool:
        """Whether rows can be merged with each other: the tokens are the same but for a few."""
        return not self.permuted and len(self.replaced) <= _OTHER_VOCABULARY * (self.same + len(self.replaced))


def is_placeholder(token: str) -> bool:
    """Return whether a token is one that stands for nothing: reserved, unused, padding."""
    return _PLACEHOLDER.match(token) is not None


def compare_vocabularies(first: Vocabulary, second: Vocabulary, rows: int) -> Comparison:
    """Compare two vocabularies, token by token.

    Args:
        first: That of one model.
        second: That of another.
        rows: How many rows are merged; tokens behind them are not looked at.
    """
    if first.numbered != second.numbered or first.spelling != second.spelling:
        return Comparison(comparable=_same_up_to_shift(first.tokens, second.tokens))
    ours, theirs = _rows_of(first, rows), _rows_of(second, rows)
    if ours == theirs:
        return Comparison(same=len(ours))
    other = sorted(number for number in ours.keys() | theirs.keys() if ours.get(number) != theirs.get(number))
    found = Comparison(same=len(ours.keys() & theirs.keys()) - sum(n in ours and n in theirs for n in other))
    both = set(ours.values()) & set(theirs.values())
    for number in other:
        a, b = ours.get(number), theirs.get(number)
        if a is None or b is None:
            if not is_placeholder(token := a or b or ""):
                (found.only_second if a is None else found.only_first)[number] = token
        elif is_placeholder(a) or is_placeholder(b):
            if not (is_placeholder(a) and is_placeholder(b)):
                found.renamed.append(Renamed(number, a, b))
        elif a in both and b in both:
            found.permuted.append(Renamed(number, a, b))
        elif number in first.added or number in second.added:
            found.renamed.append(Renamed(number, a, b))
        else:
            found.replaced.append(Renamed(number, a, b))
    return found


def _rows_of(vocabulary: Vocabulary, rows: int) -> Mapping[int, str]:
    """Return the tokens that have a row."""
    tokens = vocabulary.tokens
    return tokens if max(tokens, default=0) < rows else {n: token for n, token in tokens.items() if n < rows}


def _same_up_to_shift(first: Mapping[int, str], second: Mapping[int, str]) -> bool:
    """Return whether two files that number tokens in their own ways hold the same tokens in the same order.

    Classes put special tokens in front of the pieces of a sentencepiece file: XLM-R's rows are one further on.
    """
    places = {token: number for number, token in second.items()}
    shifts = Counter(places[token] - number for number, token in first.items() if token in places)
    shared = shifts.total()
    enough = shared >= (1 - _OTHER_FILE) * min(len(first), len(second))
    return bool(shifts) and enough and shifts.most_common(1)[0][1] >= (1 - _OTHER_VOCABULARY) * shared
