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


@dataclass(frozen=True, slots=True)
class Sample:
    """What a model reads at once.

    Args:
        stacks: One sequence, or for an encoder-decoder one for each of its stacks.
        where: File and line that it comes from, for messages.
    """

    stacks: tuple[Tokens, ...]
    where: str

    @property
    def longest(self) -> int:
        """The tokens of its longest sequence."""
        return max(len(tokens.ids) for tokens in self.stacks)


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
        stacks: What each of the model's stacks reads. An encoder-decoder has two, whose padded lengths differ, so that
            the shape of what a matrix receives tells which of them it is.
        where: For each sample, file and line that it comes from.
    """

    stacks: tuple[Padded, ...]
    where: tuple[str, ...]

    def inputs(self) -> dict[str, Tensor]:
        """Return what the model's forward takes; there is no mask where there is no padding."""
        names = ("", "decoder_")[: len(self.stacks)]
        found = {f"{name}input_ids": padded.ids for name, padded in zip(names, self.stacks, strict=True)}
        masks = zip(names, self.stacks, strict=True)
        return found | {f"{name}attention_mask": padded.valid.long() for name, padded in masks if not padded.full}


def make_batches(samples: Sequence[Sample], budget: int, pad_id: int) -> list[Batch]:
    """Divide samples into batches, the longest first, so that there is little padding and memory runs out at once.

    Args:
        samples: What the model reads.
        budget: Most tokens of a batch, with padding, in its longest stack; a longer sample is a batch by itself.
        pad_id: The token that padding consists of.
    """
    groups: list[list[Sample]] = []
    for _, sample in sorted(enumerate(samples), key=lambda pair: (-pair[1].longest, pair[0])):
        if not groups or (len(groups[-1]) + 1) * groups[-1][0].longest > budget:
            groups.append([])
        groups[-1].append(sample)
    batches: list[Batch] = []
    first = [0] * len(samples[0].stacks) if samples else []
    for group in groups:
        stacks: list[Padded] = []
        for stack, start in enumerate(first):
            taken = {padded.ids.shape[1] for padded in stacks}
            stacks.append(_padded([sample.stacks[stack] for sample in group], start, taken, pad_id))
        batches.append(Batch(tuple(stacks), tuple(sample.where for sample in group)))
        first = [padded.first + padded.rows for padded in stacks]
    return batches


def _padded(group: Sequence[Tokens], first: int, taken: set[int], pad_id: int) -> Padded:
    """Pad sequences to the longest, and one more where that length is taken."""
    width = max(len(tokens.ids) for tokens in group)
    width += width in taken
    rows = [(tokens, width - len(tokens.ids)) for tokens in group]
    return Padded(
        torch.tensor([[*tokens.ids, *[pad_id] * rest] for tokens, rest in rows]),
        torch.tensor([[True] * len(tokens.ids) + [False] * rest for tokens, rest in rows]),
        torch.tensor([[*tokens.counted, *[False] * rest] for tokens, rest in rows]),
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
