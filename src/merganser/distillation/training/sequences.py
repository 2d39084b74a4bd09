"""The sequences that a model is trained on, and what each source teaches on them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...calibration.data.batches import Sample
from ..alignment.answers import Reading, spoken_alone
from ..alignment.chunks import Chunks, chunks
from ..alignment.pairing import PairCounts, lesson_by_pairs
from ..alignment.tables import Table, byte_table, edit_table
from ..alignment.transfer import Lesson, Predictions, lesson_by_bytes, lesson_by_warping
from ..format import LogitCache
from ..vocabulary import Vocabulary
from .recipe import DEBIASED, SPACES, STATISTICS

__all__ = [
    "Alignment",
    "Cached",
    "Example",
    "Teacher",
    "cached_examples",
    "read_cache",
    "reading_of",
    "summary",
    "teach",
]

Progress = Callable[[int, int], None]


@dataclass
class Example:
    """A sequence of the student, and what it is taught.

    Args:
        record: Hash of the record that it is from.
        reading: As the student reads it.
        lessons: By number of the source.
        cross_entropy: Of each source that teaches, in nats per token of the student, by number; tokens without text before them
            do not count, as not all models predict them.
    """

    record: int
    reading: Reading
    lessons: dict[int, Lesson | Chunks] = field(default_factory=dict)
    cross_entropy: dict[int, float] = field(default_factory=dict)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The tokens that are predicted, -100 where a token does not count, or has none before it; int64, shape [n]."""
        found = np.where(self.reading.counted, self.reading.ids, -100)
        found[:1] = -100
        return found


@dataclass(frozen=True)
class Cached:
    """A sequence of a cache: as the source reads it, and what it predicts there."""

    record: int
    reading: Reading
    predictions: Predictions
    token_log_probabilities: NDArray[np.float32]
    words: NDArray[np.float32]


def read_cache(cache: LogitCache) -> Iterator[Cached]:
    """Yield the sequences of a cache, with one shard in memory.

    Raises:
        DataError: A shard is damaged.
    """
    for number in range(len(cache.files)):
        shard = cache.shard(number)
        ends = [0, *shard["sequence_ends"].tolist()]
        sizes = shard["byte_ends"][shard["sequence_ends"] - 1].tolist()
        arrays = {key: tensor.numpy() for key, tensor in shard.items()}
        text, done = arrays["text"].tobytes(), 0
        for row, (start, stop) in enumerate(pairwise(ends)):
            own = {key: value[start:stop] for key, value in arrays.items() if key not in _OF_SEQUENCES}
            reading = Reading(
                own["token_ids"].astype(np.int64), own["byte_ends"], own["counted"], text[done : done + sizes[row]]
            )
            done += sizes[row]
            said = Predictions(own["ids"], own["log_probabilities"], own["rest"])
            yield Cached(
                int(arrays["records"][row]),
                reading,
                said,
                own["token_log_probabilities"],
                own["word_log_probabilities"],
            )


_OF_SEQUENCES = ("text", "sequence_ends", "records")


def reading_of(sample: Sample, text_and_ends: Callable[[Sequence[int]], tuple[bytes, list[int]]]) -> Reading:
    """Return a sample as a reading."""
    tokens = sample.stacks[0]
    text, ends = text_and_ends(tokens.ids)
    return Reading(np.array(tokens.ids), np.array(ends, np.int64), np.array(tokens.counted), text)


def cached_examples(
    caches: Sequence[LogitCache], vocabulary: Vocabulary, tokenise: Callable[[Cached], Reading | None]
) -> list[Example]:
    """Return every sequence of some caches once.

    Args:
        caches: The caches.
        vocabulary: Of the student.
        tokenise: Reads the text of a sequence as the student does; None if it cannot. It is not asked for sequences of a
            source with the student's own tokens.
    """
    found: dict[tuple[int, tuple[bytes, ...]], Example] = {}
    # a sequence that is read by several is best taken from one with the student's own tokens
    for cache in sorted(caches, key=lambda own: own.vocabulary() != vocabulary):
        same = cache.vocabulary() == vocabulary
        for own in read_cache(cache):
            key = own.record, own.reading.answers()
            if key in found:
                continue
            reading = own.reading if same else tokenise(own)
            if reading is not None:
                found[key] = Example(own.record, reading)
    return [*found.values()]


@dataclass(frozen=True)
class Alignment:
    """How predictions of sources are mapped to the student's tokens.

    Args:
        loss: `cross_entropy` or `alm`.
        by: `bytes`, `edit_distance` or `statistics`.
        chunks: `finest`, `spaces` or `debiased`.
        threshold: Of debiased chunks.
        vocabulary: Of the student.
        size: Number of its logits.
    """

    loss: str
    by: str
    chunks: str
    threshold: float
    vocabulary: Vocabulary
    size: int


class Teacher:
    """A source with its cache.

    Args:
        number: Its number among the sources.
        cache: What it predicts.
        alignment: How that is brought to the student's tokens.
        advance: Called while a table of edit distances is made, with the number of tokens done, and of all.
    """

    def __init__(self, number: int, cache: LogitCache, alignment: Alignment, advance: Progress | None = None) -> None:
        self.number, self.cache = number, cache
        self._alignment = alignment
        source = cache.vocabulary()
        self._same = source == alignment.vocabulary
        self._counts = PairCounts() if alignment.by == STATISTICS and not self._same else None
        self._source = source
        self._table = self._make_table(source, advance)
        # a source may have logits that the student lacks: rows that fill up its vocabulary
        self._identical = self._same and cache.size <= alignment.size

    def _make_table(self, source: Vocabulary, advance: Progress | None) -> Table:
        table = np.full(self.cache.size, -1, np.int64)
        if self._alignment.loss == "alm":
            return table
        target = self._alignment.vocabulary
        if self._counts is not None:
            made = self._counts.table(source, target)
        elif self._alignment.by == "edit_distance":
            made = edit_table(source, target, advance)
        else:
            made = byte_table(source, target)
        table[: len(made)] = made[: len(table)]
        table[table >= self._alignment.size] = -1
        if self._same:
            extra = np.arange(len(made), min(len(table), self._alignment.size))
            table[extra] = extra
        return table

    @property
    def counts(self) -> bool:
        """Whether pairs of tokens are counted before anything is taught."""
        return self._counts is not None

    def count(self, student: Reading, said: Cached) -> None:
        """Count the pairs of tokens of a sequence."""
        assert self._counts is not None
        self._counts.add(student, said.reading, self._spoken(student, said))

    def settle(self) -> None:
        """Map the source's tokens by the pairs that were counted."""
        self._table = self._make_table(self._source, None)

    def lesson(self, student: Reading, said: Cached) -> Lesson | Chunks | None:
        """Return what is taught on a sequence; None if nothing is."""
        if self._alignment.loss == "alm":
            own = self._alignment
            found = chunks(
                student,
                said.reading,
                said.token_log_probabilities,
                at_spaces=own.chunks == SPACES,
                words=said.words if own.chunks == DEBIASED else None,
                threshold=own.threshold,
            )
            return found if len(found.log_probabilities) else None
        lesson = self._distributions(student, said)
        counted = student.counted[lesson.positions + 1]
        if not counted.any():
            return None
        return lesson if counted.all() else lesson.only(counted)

    def _distributions(self, student: Reading, said: Cached) -> Lesson:
        if self._alignment.by == "edit_distance":
            spoken = self._spoken(student, said)
            return lesson_by_warping(student, said.reading, said.predictions, self._table, spoken)
        if self._counts is not None:
            spoken = self._spoken(student, said)
            return lesson_by_pairs(student, said.reading, said.predictions, self._table, spoken, self._counts)
        return lesson_by_bytes(student, said.reading, said.predictions, self._table, same=self._identical)

    def _spoken(self, student: Reading, said: Cached) -> tuple[list[bytes], list[bytes]]:
        """Return the bytes of the tokens of both readings."""
        return _bytes_of(self._alignment.vocabulary.tokens, student), _bytes_of(self._source.tokens, said.reading)


def _bytes_of(tokens: Sequence[bytes | None], reading: Reading) -> list[bytes]:
    return [tokens[i] or b"" if i < len(tokens) else b"" for i in reading.ids.tolist()]


def teach(sequences: Sequence[Example], teachers: Sequence[Teacher], advance: Progress | None = None) -> None:
    """Give every sequence the lessons of all sources that read its text.

    Args:
        sequences: The sequences; lessons are added to them.
        teachers: The sources.
        advance: Called with the number of sequences of caches that are done, and of all.
    """
    by_record: dict[int, list[Example]] = defaultdict(list)
    for own in sequences:
        by_record[own.record].append(own)
    total, done = sum(int(teacher.cache.total("sequences")) for teacher in teachers), 0
    for teacher in teachers:
        if teacher.counts:
            for said in read_cache(teacher.cache):
                for _, student, heard in _matching(by_record.get(said.record, ()), said):
                    teacher.count(student, heard)
            teacher.settle()
        for said in read_cache(teacher.cache):
            for own, student, heard in _matching(by_record.get(said.record, ()), said):
                _take(own, student, teacher, heard)
            done += 1
            if advance is not None:
                advance(done, total)


def _matching(sequences: Sequence[Example], said: Cached) -> Iterator[tuple[Example, Reading, Cached]]:
    """Yield the sequences with the same answers, and both readings without what one chat template alone writes before them."""
    for own in sequences:
        student, source = spoken_alone(own.reading, said.reading), spoken_alone(said.reading, own.reading)
        if _alike(student, source):
            yield own, student, replace(said, reading=source)


def _alike(one: Reading, other: Reading) -> bool:
    """Return whether all answers are the same, but for where the last one is cut."""
    own, others = one.answers(), other.answers()
    if len(own) != len(others) or own[:-1] != others[:-1]:
        return False
    return not own or own[-1].startswith(others[-1]) or others[-1].startswith(own[-1])


def _take(own: Example, student: Reading, teacher: Teacher, said: Cached) -> None:
    """Add what a source teaches of a sequence, which the student reads as `student`."""
    lesson = teacher.lesson(student, said)
    if lesson is None or (teacher.number in own.lessons and _size(own.lessons[teacher.number]) >= _size(lesson)):
        return
    heard, known = _inner(student), _inner(said.reading)
    nats = -float(said.token_log_probabilities[known].astype(np.float64).sum())
    # what a source reads may be cut elsewhere, or have more tokens
    share = _width(student, heard) / max(1, _width(said.reading, known))
    own.lessons[teacher.number] = lesson
    own.cross_entropy[teacher.number] = nats * share / max(1, int(heard.sum()))


def _size(lesson: Lesson | Chunks) -> int:
    return len(lesson.positions) if isinstance(lesson, Lesson) else int((lesson.numbers >= 0).sum())


def _inner(reading: Reading) -> NDArray[np.bool_]:
    """Return which tokens that count have text before them; of others only models that begin with a special token say something."""
    before = np.concatenate([[0], reading.ends[:-1]])
    found: NDArray[np.bool_] = reading.counted & (before > 0)
    if not found.any():
        found = reading.counted & (np.arange(len(before)) > 0)
    return found


def _width(reading: Reading, tokens: NDArray[np.bool_]) -> int:
    return int(np.diff(reading.ends, prepend=0)[tokens].sum())


def summary(sequences: Sequence[Example], sources: int) -> dict[str, Any]:
    """Return the numbers of sequences, of tokens that are predicted, and for each source of those that it teaches."""
    tokens = sum(int((own.labels >= 0).sum()) for own in sequences)
    taught = [sum(_size(own.lessons[i]) for own in sequences if i in own.lessons) for i in range(sources)]
    means = []
    for number in range(sources):
        known = [own.cross_entropy[number] for own in sequences if number in own.cross_entropy]
        means.append(math.fsum(known) / len(known) if known else None)
    return {"sequences": len(sequences), "tokens": tokens, "taught": taught, "nats_per_token": means}
