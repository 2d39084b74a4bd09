"""Batches of sequences with their lessons, as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..alignment.chunks import Chunks
from ..alignment.transfer import Lesson
from .sequences import Example

__all__ = ["Lessons", "collate", "whole_batch"]


class Lessons(torch.utils.data.Dataset[Example]):
    """Sequences in the form of a data set of torch."""

    def __init__(self, sequences: Sequence[Example]) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> Example:
        return self._sequences[index]


def collate(sequences: Sequence[Example], sources: int) -> dict[str, Any]:
    """Put sequences into one batch of B sequences, T tokens at most, and S sources.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64, shape [B, T]; and under `lesson` the tensors

        cross_entropy      float32 [B, S]  of the sources, infinity where one does not teach
        rows               int64 [m]       positions that are taught, b * T + t
        shares             int64 [m]       by whom: b * S + s
        ids                int64 [m, k]    as in `Lesson`, like the next two
        log_probabilities  float32 [m, k]
        rest               float32 [m]
        numbers            int64 [S, B, T] chunk of each token, -1 for none
        chunk_shares       int64 [c]       whose chunk it is: b * S + s
        chunks             float32 [c]     the source's log-probability of it
        chunk_ends         int64 [c]       its last token, b * T + t, if chunks are debiased; else -1
        chunk_counts       int64 [B, S]    number of chunks of each sequence by each source
    """
    width = max(len(own.labels) for own in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    labels = torch.full((len(sequences), width), -100)
    for row, own in enumerate(sequences):
        ids[row, : len(own.labels)] = torch.from_numpy(own.reading.ids)
        labels[row, : len(own.labels)] = torch.from_numpy(own.labels)
    lengths = torch.tensor([len(own.labels) for own in sequences])
    entropies = [[own.cross_entropy.get(s, math.inf) for s in range(sources)] for own in sequences]
    lesson = {"cross_entropy": torch.tensor(entropies), **_distributions(sequences, width, sources)}
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        "labels": labels,
        "lesson": lesson | _chunks(sequences, width, sources),
    }


def whole_batch(parts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return what the loss of one part must know of the whole batch, so that it does not matter how that is divided.

    Args:
        parts: From `collate`.

    Returns:
        `cross_entropy` and `chunk_counts` of all sequences, as in `collate`, and `tokens`, the number of tokens that are
        predicted, int64, 0-d.
    """
    found = {name: torch.cat([own["lesson"][name] for own in parts]) for name in ("cross_entropy", "chunk_counts")}
    return {**found, "tokens": torch.stack([(own["labels"][:, 1:] >= 0).sum() for own in parts]).sum()}


def _distributions(sequences: Sequence[Example], width: int, sources: int) -> dict[str, Tensor]:
    given = [
        (b, s, own) for b, each in enumerate(sequences) for s, own in each.lessons.items() if isinstance(own, Lesson)
    ]
    k = max((own.ids.shape[1] for _, _, own in given), default=1)

    def widened(values: Any, fill: float) -> Any:
        return np.pad(values, ((0, 0), (0, k - values.shape[1])), constant_values=fill)

    def joined(parts: list[Any], empty: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(dtype) if parts else torch.zeros(empty, dtype=dtype)

    return {
        "rows": joined([own.positions + b * width for b, _, own in given], (0,), torch.long),
        "shares": joined([np.full(len(own.positions), b * sources + s) for b, s, own in given], (0,), torch.long),
        "ids": joined([widened(own.ids, -1) for _, _, own in given], (0, 1), torch.long),
        "log_probabilities": joined(
            [widened(own.log_probabilities, -np.inf) for _, _, own in given], (0, 1), torch.float32
        ),
        "rest": joined([own.rest for _, _, own in given], (0,), torch.float32),
    }


def _chunks(sequences: Sequence[Example], width: int, sources: int) -> dict[str, Tensor]:
    numbers = torch.full((sources, len(sequences), width), -1)
    counts = torch.zeros(len(sequences), sources, dtype=torch.long)
    shares: list[int] = []
    found: list[float] = []
    ends: list[int] = []
    for b, each in enumerate(sequences):
        for s, own in each.lessons.items():
            if isinstance(own, Chunks):
                own_numbers = torch.from_numpy(own.numbers)
                numbers[s, b, : len(own_numbers)] = torch.where(own_numbers >= 0, own_numbers + len(found), -1)
                counts[b, s] = len(own.log_probabilities)
                shares += [b * sources + s] * len(own.log_probabilities)
                found += own.log_probabilities.tolist()
                ends += [-1] * len(own.log_probabilities) if own.ends is None else (own.ends + b * width).tolist()
    return {
        "numbers": numbers,
        "chunk_shares": torch.tensor(shares, dtype=torch.long),
        "chunks": torch.tensor(found, dtype=torch.float32),
        "chunk_ends": torch.tensor(ends, dtype=torch.long),
        "chunk_counts": counts,
    }
