"""Chunks of text whose likelihood two models are compared on (approximate likelihood matching, ALM)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .answers import Reading, answer_groups

__all__ = ["Chunks", "chunks"]

_SPACE = b" "


@dataclass(frozen=True)
class Chunks:
    """Chunks of a sequence.

    Args:
        numbers: For each token of the student the number of its chunk, -1 for none; int64, shape [n].
        log_probabilities: Of each chunk, by the source, float32, shape [chunks].
    """

    numbers: NDArray[np.int64]
    log_probabilities: NDArray[np.float32]


def chunks(
    student: Reading, source: Reading, token_log_probabilities: NDArray[np.float32], *, at_spaces: bool = False
) -> Chunks:
    """Divide a sequence into the finest chunks that are whole tokens in both models.

    A chunk with a first token of a sequence, which nothing predicts, is left out.

    Args:
        student: The sequence as the model that is taught reads it.
        source: As the source reads it.
        token_log_probabilities: Of each of its tokens, by the source, given those before.
        at_spaces: Whether chunks end only where a space follows, or the text ends.
    """
    numbers = np.full(len(student.ids), -1, np.int64)
    found: list[float] = []
    for start, other_start, groups in answer_groups(student, source):
        own, others = _with_bytes(student), _with_bytes(source)
        opened: tuple[int, int] | None = None
        for number in range(len(groups)):
            stop, other_stop = int(groups.stops[number]) + start, int(groups.other_stops[number]) + other_start
            if opened is None:
                opened = int(groups.starts[number]) + start, int(groups.other_starts[number]) + other_start
            end = int(student.ends[stop - 1])
            more = number + 1 < len(groups)
            if at_spaces and more and student.text[end : end + 1] != _SPACE:
                continue
            (first, other_first), opened = opened, None
            if first and other_first:
                inside = np.arange(first, stop)
                numbers[inside[own[first:stop]]] = len(found)
                spoken = token_log_probabilities[other_first:other_stop][others[other_first:other_stop]]
                found.append(float(spoken.astype(np.float64).sum()))
    return Chunks(numbers, np.array(found, np.float32))


def _with_bytes(reading: Reading) -> NDArray[np.bool_]:
    return np.diff(reading.ends, prepend=0) > 0
