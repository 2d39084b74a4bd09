"""Sequences of tokens, and batches of them as a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Batch", "Sample", "Tokens", "make_batches", "pad"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one sequence.

    Args:
        ids: The tokens.
        counted: For each, whether statistics see it.
    """

    ids: tuple[int, ...]
    counted: tuple[bool, ...]


Sample = tuple[Tokens, ...]
"""What a model reads at once: one sequence, or for an encoder-decoder one for each of its stacks."""


@dataclass(frozen=True)
class Padded:
    """Sequences of several samples, padded on the right to equal length.

    Args:
        ids: Int64, shape [sequences, longest].
        valid: Where there is a token and not padding, bool, same shape.
        counted: Tokens that statistics see, bool, same shape; never where there is padding.
        first: The first of these tokens among those of all batches.
    """

    ids: Tensor
    valid: Tensor
    counted: Tensor
    first: int

    @cached_property
    def rows(self) -> int:
        """The number of tokens without padding."""
        return int(self.valid.sum())

    @cached_property
    def full(self) -> bool:
        """Whether there is no padding."""
        return bool(self.valid.all())


@dataclass(frozen=True)
class Batch:
    """Samples that a model reads at once.

    Args:
        stacks: What each of the model's stacks reads; an encoder-decoder has two.
    """

    stacks: tuple[Padded, ...]

    def inputs(self) -> dict[str, Tensor]:
        """Return what the model's forward takes; there is no mask where there is no padding."""
        names = ("", "decoder_")[: len(self.stacks)]
        found = {f"{name}input_ids": padded.ids for name, padded in zip(names, self.stacks, strict=True)}
        masks = zip(names, self.stacks, strict=True)
        return found | {f"{name}attention_mask": padded.valid.long() for name, padded in masks if not padded.full}


def make_batches(
    samples: Sequence[Sample], budget: int, pad_id: int, device: torch.device | None = None
) -> list[Batch]:
    """Divide samples into batches, the longest first, so that there is little padding and memory runs out at once.

    Args:
        samples: What the model reads.
        budget: Most tokens of a batch, with padding, in its longest stack; a longer sample is a batch by itself.
        pad_id: The token that padding consists of.
        device: Where the model is.
    """
    lengths = [max(len(tokens.ids) for tokens in sample) for sample in samples]
    groups: list[list[Sample]] = []
    for index in sorted(range(len(samples)), key=lambda i: (-lengths[i], i)):
        if not groups or (len(groups[-1]) + 1) * _longest(groups[-1][0]) > budget:
            groups.append([])
        groups[-1].append(samples[index])
    batches: list[Batch] = []
    first = [0] * len(samples[0]) if samples else []
    for group in groups:
        stacks = tuple(
            _padded([sample[stack] for sample in group], first[stack], pad_id, device) for stack in range(len(first))
        )
        batches.append(Batch(stacks))
        first = [start + padded.rows for start, padded in zip(first, stacks, strict=True)]
    return batches


def _longest(sample: Sample) -> int:
    return max(len(tokens.ids) for tokens in sample)


def _padded(group: Sequence[Tokens], first: int, pad_id: int, device: torch.device | None) -> Padded:
    width = max(len(tokens.ids) for tokens in group)
    missing = [width - len(tokens.ids) for tokens in group]
    rows = list(zip(group, missing, strict=True))
    return Padded(
        torch.tensor([[*tokens.ids, *[pad_id] * rest] for tokens, rest in rows], device=device),
        torch.tensor([[True] * len(tokens.ids) + [False] * rest for tokens, rest in rows], device=device),
        torch.tensor([[*tokens.counted, *[False] * rest] for tokens, rest in rows], device=device),
        first,
    )


def pad(rows: Tensor, valid: Tensor) -> Tensor:
    """Lay out the tokens of a batch.

    Args:
        rows: The tokens of its sequences, one sequence after the other, shape [tokens, width].
        valid: Where the batch has tokens, bool, shape [sequences, longest].

    Returns:
        Shape [sequences, longest, width], zero where there is padding.
    """
    if len(rows) == valid.numel():
        return rows.view(*valid.shape, -1)
    padded = rows.new_zeros(*valid.shape, rows.shape[-1])
    padded[valid] = rows
    return padded
