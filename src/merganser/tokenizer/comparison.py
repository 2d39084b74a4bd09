"""Compare the tokens that the rows of two models' embeddings stand for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .vocabulary import Vocabulary

__all__ = ["Comparison", "Renamed", "compare_vocabularies", "is_placeholder"]

# Reserved and padding tokens, whose embedding rows are not trained.
_PLACEHOLDER = re.compile(
    r"▁?[<\[{|>]+\W*\w*(reserved|unused|placeholder|dummy|extra_id|(special|control|extra|additional)_?\d|pad(_|ding|\W))"
    r"|madeupword\d",
    re.IGNORECASE,
)

_OTHER_VOCABULARY = 0.01
"""If a larger share of ordinary tokens differs, the vocabularies are different, not one with a few corrections."""

_OTHER_FILE = 0.1
"""Share of tokens, such as special and reserved ones, that may be missing in one of two files of one tokenizer."""


@dataclass(frozen=True, slots=True)
class Renamed:
    """A row that stands for different tokens in two vocabularies."""

    id: int
    first: str
    second: str


@dataclass(slots=True)
class Comparison:
    """How two vocabularies differ in the rows that are merged. Reserved rows are ignored.

    Attributes:
        permuted: Rows whose two tokens both exist in both models, but at different rows.
        replaced: Rows whose ordinary token is another ordinary token in the second model.
        renamed: Rows whose tokens differ, and one of the two is special or reserved.
        only_first: Tokens of rows that have no token in the second model.
        only_second: Tokens of rows that have no token in the first model.
        same: Number of rows that stand for the same token.
        comparable: False if the two files number tokens differently, so that rows cannot be compared.
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
        """Whether rows can be merged with each other: no token moved, and few differ."""
        return not self.permuted and len(self.replaced) <= _OTHER_VOCABULARY * (self.same + len(self.replaced))


def is_placeholder(token: str) -> bool:
    """Return whether a token has no meaning: reserved, unused or padding."""
    return _PLACEHOLDER.match(token) is not None


def compare_vocabularies(first: Vocabulary, second: Vocabulary, rows: int) -> Comparison:
    """Compare two vocabularies, token by token.

    Args:
        first: Vocabulary of one model.
        second: Vocabulary of the other model.
        rows: Number of rows that are merged; tokens with higher ids are ignored.
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
    """Return the tokens whose ids are below the number of rows."""
    tokens = vocabulary.tokens
    return tokens if max(tokens, default=0) < rows else {n: token for n, token in tokens.items() if n < rows}


def _same_up_to_shift(first: Mapping[int, str], second: Mapping[int, str]) -> bool:
    """Return whether two files that number tokens differently hold the same tokens in the same order.

    Tokenizer classes put special tokens before the pieces of a sentencepiece file: XLM-R's rows are shifted by one.
    """
    places = {token: number for number, token in second.items()}
    shifts = Counter(places[token] - number for number, token in first.items() if token in places)
    shared = shifts.total()
    enough = shared >= (1 - _OTHER_FILE) * min(len(first), len(second))
    return bool(shifts) and enough and shifts.most_common(1)[0][1] >= (1 - _OTHER_VOCABULARY) * shared
