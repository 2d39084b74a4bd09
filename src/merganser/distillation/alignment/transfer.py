"""A source's predictions as distributions over the student's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .answers import Reading, answer_groups
from .tables import Table
from .warping import partners

__all__ = ["Lesson", "Predictions", "lesson_by_bytes", "lesson_by_warping", "same_reading"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Predictions:
    """What a source predicts at each of n positions: see `distillation.format`.

    Args:
        ids: The likeliest tokens, int32, shape [n, k].
        log_probabilities: Theirs, float32, shape [n, k].
        rest: Logarithm of the probability of all others, float32, shape [n].
    """

    ids: NDArray[np.int32]
    log_probabilities: Floats
    rest: Floats


@dataclass(frozen=True)
class Lesson:
    """What the model is to predict at m of its positions.

    Args:
        positions: Positions, int64, shape [m]; at position p the next token p + 1 is predicted.
        ids: Tokens, int32, shape [m, k], each once, -1 where a row has fewer.
        log_probabilities: Theirs, float32, shape [m, k]; minus infinity where a row has fewer.
        rest: Logarithm of the probability of all other tokens together, float32, shape [m].
    """

    positions: NDArray[np.int64]
    ids: NDArray[np.int32]
    log_probabilities: Floats
    rest: Floats

    def only(self, kept: NDArray[np.bool_]) -> Lesson:
        """Return the lesson at some of its positions."""
        return Lesson(self.positions[kept], self.ids[kept], self.log_probabilities[kept], self.rest[kept])


def same_reading(one: Reading, other: Reading) -> int:
    """Return the number of tokens at which two readings by one tokenizer begin alike."""
    size = min(len(one.ids), len(other.ids))
    differ = np.flatnonzero(one.ids[:size] != other.ids[:size])
    return int(differ[0]) if len(differ) else size


def lesson_by_bytes(student: Reading, source: Reading, predictions: Predictions, table: Table, *, same: bool) -> Lesson:
    """Take over predictions wherever tokens of both models end at the same byte.

    At such a place both predict what follows, but for the beginning of an answer before which only one of them writes white
    space: there the source says what comes behind it. Probabilities of tokens that go to one token of the student are added; those of
    tokens that go to none are part of the rest. With one tokenizer this is the identity.

    Args:
        student: The sequence as the model that is taught reads it.
        source: As the source reads it.
        predictions: Of the source, one for each of its tokens.
        table: From tokens of the source to those of the student.
        same: Whether both have the same tokens.
    """
    alike = same_reading(student, source) if same else 0
    if alike == len(student.ids):
        places = np.arange(alike - 1)
        return _lesson(places, places, predictions, table, same=True)
    own: list[int] = []
    others: list[int] = []
    for start, other_start, groups, alike in answer_groups(student, source):
        own += (groups.starts + start).tolist()[not alike :]
        others += (groups.other_starts + other_start).tolist()[not alike :]
        if len(groups):
            ends = int(groups.stops[-1]) + start, int(groups.other_stops[-1]) + other_start
            if _same_special(student, source, *ends, table):
                own.append(ends[0])
                others.append(ends[1])
    pairs = [(i - 1, j - 1) for i, j in zip(own, others, strict=True) if i and j]
    positions, places = np.array(pairs, np.int64).reshape(-1, 2).T
    return _lesson(positions, places, predictions, table, same=same)


def _same_special(student: Reading, source: Reading, token: int, other: int, table: Table) -> bool:
    """Return whether both readings go on with the same special token, such as the end of a turn."""
    if token >= len(student.ids) or other >= len(source.ids):
        return False
    empty = student.ends[token] == student.before(token) and source.ends[other] == source.before(other)
    return bool(empty and table[source.ids[other]] == student.ids[token])


def lesson_by_warping(
    student: Reading,
    source: Reading,
    predictions: Predictions,
    table: Table,
    tokens: tuple[Sequence[bytes], Sequence[bytes]],
) -> Lesson:
    """Take over predictions behind each token that is paired with one equal token, as FuseLLM does.

    Tokens are paired by dynamic time warping. Of several tokens that go to one of the student the likeliest is kept, and
    the k that remain share all probability.

    Args:
        student: The sequence as the model that is taught reads it.
        source: As the source reads it.
        predictions: Of the source, one for each of its tokens.
        table: From tokens of the source to those of the student.
        tokens: The bytes of the tokens of both readings.
    """
    pairs = [
        (i, j[0])
        for i, j in enumerate(partners(*tokens))
        if len(j) == 1 and table[source.ids[j[0]]] == student.ids[i] and i + 1 < len(student.ids)
    ]
    positions, places = np.array(pairs, np.int64).reshape(-1, 2).T
    mapped = table[predictions.ids[places]]
    found = predictions.log_probabilities[places].astype(np.float64)
    for column in range(1, mapped.shape[1]):
        # the likeliest come first
        again = (mapped[:, :column] == mapped[:, column : column + 1]).any(1)
        mapped[again, column] = -1
    found[mapped < 0] = -np.inf
    with np.errstate(divide="ignore"):
        found -= np.log(np.exp(found).sum(1, keepdims=True))
    some = (mapped >= 0).any(1)
    rest = np.full(int(some.sum()), -np.inf, np.float32)
    return Lesson(positions[some], mapped[some].astype(np.int32), found[some].astype(np.float32), rest)


def _lesson(
    positions: NDArray[np.int64], places: NDArray[np.int64], predictions: Predictions, table: Table, *, same: bool
) -> Lesson:
    found, rest = predictions.log_probabilities[places], predictions.rest[places]
    if same:
        return Lesson(positions, predictions.ids[places], found, rest)
    mapped = table[predictions.ids[places]]
    probabilities = np.exp(found.astype(np.float64))
    left = np.exp(rest.astype(np.float64)) + np.where(mapped < 0, probabilities, 0.0).sum(1)
    ids, probabilities = _added(mapped, probabilities)
    with np.errstate(divide="ignore"):
        logs, rest = np.log(probabilities), np.log(left)
    some = (ids >= 0).any(1)
    return Lesson(positions[some], ids[some], logs[some].astype(np.float32), rest[some].astype(np.float32))


def _added(ids: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Add the values of equal ids of a row, and leave out ids below 0; rows are filled up with -1 and 0."""
    added, sums = np.full(ids.shape, -1, np.int32), np.zeros(values.shape)
    if not ids.size:
        return added, sums
    order = np.argsort(ids, axis=1, kind="stable")
    ids, values = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
    first = ids >= 0
    first[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    columns = np.cumsum(first, axis=1) - 1
    rows = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    kept = ids >= 0
    np.add.at(sums, (rows[kept], columns[kept]), values[kept])
    added[rows[kept], columns[kept]] = ids[kept]
    return added, sums
