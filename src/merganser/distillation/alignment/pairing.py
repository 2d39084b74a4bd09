"""Statistics of which tokens are paired, over all sequences (FuseChat)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from ..vocabulary import Vocabulary
from .answers import Reading
from .edit_distance import edit_distances
from .tables import Table, table_of
from .transfer import Lesson, Predictions
from .warping import Pairs, partners

__all__ = ["CONTAINED", "PairCounts", "lesson_by_pairs"]

CONTAINED = 0.1
"""Factor of the edit distance of two tokens of which one holds the other, in the authors' code."""

Tokens = tuple[Sequence[bytes], Sequence[bytes]]


class PairCounts:
    """How often each token of a source was paired with each of the student's, by dynamic time warping."""

    def __init__(self) -> None:
        self._counts: dict[int, Counter[int]] = defaultdict(Counter)

    def add(self, student: Reading, source: Reading, tokens: Tokens) -> None:
        """Count the pairs of one sequence.

        Args:
            student: The sequence as the model that is taught reads it.
            source: As the source reads it.
            tokens: The bytes of the tokens of both readings.
        """
        for own, others in zip(student.ids.tolist(), partners(*tokens, contained=CONTAINED), strict=True):
            for other in others:
                self._counts[int(source.ids[other])][own] += 1

    def of(self, student: int, source: int) -> int:
        """Return how often two tokens were paired."""
        return self._counts[source][student] if source in self._counts else 0

    def table(self, source: Vocabulary, target: Vocabulary) -> Table:
        """Map each token to the target's of the same bytes, else to the one that it was paired with most often.

        Of several the one with the fewest edits is taken; tokens that were never paired go to none.
        """

        def find(number: int) -> int:
            counted, token = self._counts.get(number), source.tokens[number]
            if not counted or not token:
                return -1
            most = max(counted.values())
            return min(
                (own for own, count in counted.items() if count == most),
                key=lambda own: (_edits(token, target.tokens[own] or b""), own),
            )

        return table_of(source, target, find)


def _edits(one: bytes, other: bytes) -> int:
    return int(edit_distances(one, np.frombuffer(other, np.uint8).reshape(1, -1))[0]) if other else len(one)


def lesson_by_pairs(
    student: Reading, source: Reading, predictions: Predictions, table: Table, tokens: Tokens, counts: PairCounts
) -> Lesson:
    """Take over predictions behind tokens that are paired, as FuseChat does.

    A student's token that is paired with one token that holds it is taught what the source says behind that one. If it is
    paired with several, the first that equals it counts, else the first that holds it, else those that spell it, whose
    predictions are mixed with weights softmax(count of the pair). Of several tokens that go to one of the student the
    likeliest is kept, and the k that remain share all probability.

    Args:
        student: The sequence as the model that is taught reads it.
        source: As the source reads it.
        predictions: Of the source, one for each of its tokens.
        table: From tokens of the source to those of the student.
        tokens: The bytes of the tokens of both readings.
        counts: Of all sequences.

    Source:
        Wan et al., FuseChat: Knowledge Fusion of Chat Models, 2024, section 3.2. The authors' code weighs logits where this
        weighs probabilities, and multiplies edit distances by a sigmoid of the count where this takes the largest count.
    """
    k = predictions.ids.shape[1]
    mapped = table[predictions.ids]
    probabilities = np.exp(predictions.log_probabilities.astype(np.float64))
    positions: list[int] = []
    ids = np.full((len(student.ids), k), -1, np.int32)
    logs = np.full((len(student.ids), k), -np.inf, np.float32)
    for position, pair in enumerate(partners(*tokens, contained=CONTAINED)[:-1]):
        places = _matching(tokens[0][position], pair, tokens[1])
        likeliest: dict[int, float] = {}
        shares = _softmax([counts.of(int(student.ids[position]), int(source.ids[place])) for place in places])
        for share, place in zip(shares, places, strict=True):
            for token, own in zip(mapped[place].tolist(), (share * probabilities[place]).tolist(), strict=True):
                if token >= 0 and own > 0:
                    likeliest[token] = max(own, likeliest.get(token, 0.0))
        kept = sorted(likeliest, key=lambda token: -likeliest[token])[:k]
        if kept:
            total = math.fsum(likeliest[token] for token in kept)
            row = len(positions)
            positions.append(position)
            ids[row, : len(kept)] = kept
            logs[row, : len(kept)] = [math.log(likeliest[token] / total) for token in kept]
    count = len(positions)
    return Lesson(np.array(positions, np.int64), ids[:count], logs[:count], np.full(count, -np.inf, np.float32))


def _matching(token: bytes, pair: Pairs, others: Sequence[bytes]) -> list[int]:
    """Return which of the tokens that a token is paired with teach it."""
    if not token:
        # special tokens have no bytes, and are taught only behind others of their kind
        return [*pair] if len(pair) == 1 and not others[pair[0]] else []
    for fits in (lambda other: other == token, lambda other: token in other):
        found = next((place for place in pair if fits(others[place])), None)
        if found is not None:
            return [found]
    spelled: list[int] = []
    left = token
    for place in pair:
        if others[place] and left.startswith(others[place]):
            spelled.append(place)
            left = left[len(others[place]) :]
    return [] if left else spelled


def _softmax(counts: Sequence[int]) -> list[float]:
    largest = max(counts, default=0)
    found = [math.exp(count - largest) for count in counts]
    return [own / math.fsum(found) for own in found]
