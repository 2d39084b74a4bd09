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
        ends: For each chunk the student's last token, after which a word begins: the likelihood of that is part of the
            chunk's; int64, shape [chunks]. None where it is not.
    """

    numbers: NDArray[np.int64]
    log_probabilities: NDArray[np.float32]
    ends: NDArray[np.int64] | None = None


def chunks(
    student: Reading,
    source: Reading,
    token_log_probabilities: NDArray[np.float32],
    *,
    at_spaces: bool = False,
    words: NDArray[np.float32] | None = None,
    threshold: float = 0.1,
) -> Chunks:
    """Divide a sequence into the finest chunks that are whole tokens in both models.

    Chunks begin behind the first token of a sequence, which nothing predicts.

    The likelihood of a token is also the likelihood that it is not a longer one, which another tokenizer may have. With
    `words`, chunks end only where the source thinks that a word may begin, and that one does is part of their likelihoods:
    no longer token goes on there.

    Args:
        student: The sequence as the model that is taught reads it.
        source: As the source reads it.
        token_log_probabilities: Of each of its tokens, by the source, given those before.
        at_spaces: Whether chunks end only where a space follows, or the text ends.
        words: To debias the chunks: for each token of the source the logarithm of the probability that a word begins
            behind it.
        threshold: Chunks end only where that probability is larger, or the text ends.

    Source:
        Minixhofer et al., Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching, 2025, section 3.2;
        threshold and the last chunk as in the authors' code.
    """
    numbers = np.full(len(student.ids), -1, np.int64)
    found: list[float] = []
    ends: list[int] = []
    for start, other_start, groups, _ in answer_groups(student, source):
        own, others = _with_bytes(student), _with_bytes(source)
        opened: tuple[int, int] | None = None
        for number in range(len(groups)):
            stop, other_stop = int(groups.stops[number]) + start, int(groups.other_stops[number]) + other_start
            if opened is None:
                opened = int(groups.starts[number]) + start, int(groups.other_starts[number]) + other_start
            if 0 in opened:
                opened = None
                continue
            end = int(student.ends[stop - 1])
            more = number + 1 < len(groups)
            if at_spaces and more and student.text[end : end + 1] != _SPACE:
                continue
            if words is not None and more and np.exp(np.float64(words[other_stop - 1])) <= threshold:
                continue
            (first, other_first), opened = opened, None
            inside = np.arange(first, stop)
            numbers[inside[own[first:stop]]] = len(found)
            spoken = token_log_probabilities[other_first:other_stop][others[other_first:other_stop]]
            behind = 0.0 if words is None else float(words[other_stop - 1])
            found.append(float(spoken.astype(np.float64).sum()) + behind)
            ends.append(stop - 1)
    return Chunks(numbers, np.array(found, np.float32), None if words is None else np.array(ends, np.int64))


def _with_bytes(reading: Reading) -> NDArray[np.bool_]:
    return np.diff(reading.ends, prepend=0) > 0
