"""Texts that count, apart from what surrounds them: each model sees an answer within its own chat template."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .groups import Groups, byte_groups

__all__ = ["Reading", "Stretch", "answer_groups", "spoken_alone", "stretches"]

_WHITE = b" \t\n\r"
# bytes of a letter of several bytes but its first one: a text that was cut may begin with them
_LEAD = _WHITE + bytes(range(0x80, 0xC0))


@dataclass(frozen=True)
class Reading:
    """A sequence as one tokenizer reads it, n tokens.

    Args:
        ids: The tokens, int64, shape [n].
        ends: For each token the number of bytes up to its end, int64, shape [n]; special tokens take none.
        counted: Whether the token counts, bool, shape [n].
        text: The bytes of all tokens.
    """

    ids: NDArray[np.int64]
    ends: NDArray[np.int64]
    counted: NDArray[np.bool_]
    text: bytes

    def answers(self) -> tuple[bytes, ...]:
        """Return the bytes of each stretch of tokens that count, without white space around them and parts of letters."""
        texts = (self.text[self.before(start) : self.ends[stop - 1]] for start, stop in stretches(self))
        return tuple(text.lstrip(_LEAD).rstrip(_WHITE) for text in texts)

    def before(self, token: int) -> int:
        """Return the number of bytes before a token."""
        return int(self.ends[token - 1]) if token else 0


class Stretch(NamedTuple):
    """A stretch of tokens that count, in two readings.

    Args:
        first: Its first token in the one.
        other_first: Its first token in the other.
        groups: Its groups, whose indices are counted from there.
        alike: Whether both begin with the same bytes, so that what one says before its first token is about those of the other.
    """

    first: int
    other_first: int
    groups: Groups
    alike: bool


def stretches(reading: Reading) -> list[tuple[int, int]]:
    """Return the first token of each stretch of tokens that count, and the one after its last."""
    edges = np.flatnonzero(np.diff(reading.counted.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def spoken_alone(reading: Reading, other: Reading) -> Reading:
    """Return a reading without what its chat template writes before an answer and that of the other one does not.

    Templates of models that reason put a block of thoughts there, empty where nothing is said of it. Its tokens no longer count.

    Args:
        reading: A reading of a record.
        other: Another reading of the same record.
    """
    own, answers, others = stretches(reading), reading.answers(), other.answers()
    if len(answers) != len(others) or answers == others:
        return reading
    counted = reading.counted.copy()
    for (start, stop), answer, said in zip(own, answers, others, strict=True):
        if said and answer != said and answer.endswith(said):
            text = reading.text[reading.before(start) : reading.ends[stop - 1]]
            before = len(text.rstrip(_WHITE)) - len(said)
            counted[start:stop] &= reading.ends[start:stop] - reading.before(start) > before
    return replace(reading, counted=counted)


def answer_groups(one: Reading, other: Reading) -> Iterator[Stretch]:
    """Align the first, second, ... stretch of tokens that count in both readings.

    Where they begin with different white space, or with the end of a letter that was cut, that is left out, as tokenizers of
    sentencepiece put a space there; from the first byte where the stretches differ nothing is aligned.
    """
    pairs = [*zip(stretches(one), stretches(other), strict=False)]
    if len(stretches(one)) != len(stretches(other)):
        return
    for own, others in pairs:
        white, other_white = _lead(one, own), _lead(other, others)
        alike = white == other_white
        if alike:
            white = other_white = b""
        (text, ends), (other_text, other_ends) = _core(one, own, len(white)), _core(other, others, len(other_white))
        same = _common(text, other_text)
        yield Stretch(own[0], others[0], byte_groups(ends[ends <= same], other_ends[other_ends <= same]), alike)


def _lead(reading: Reading, stretch: tuple[int, int]) -> bytes:
    """Return what may be left out at the start of a stretch."""
    text = reading.text[reading.before(stretch[0]) : reading.ends[stretch[1] - 1]]
    return text[: len(text) - len(text.lstrip(_LEAD))]


def _core(reading: Reading, stretch: tuple[int, int], white: int) -> tuple[bytes, NDArray[np.int64]]:
    """Return a stretch's bytes behind what is left out, and the ends of its tokens, counted from there."""
    start, stop = stretch
    first = reading.before(start) + white
    return reading.text[first : reading.ends[stop - 1]], np.maximum(reading.ends[start:stop] - first, 0)


def _common(one: bytes, other: bytes) -> int:
    """Return the number of bytes at which both begin alike."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    return int(np.argmax(np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size)))
