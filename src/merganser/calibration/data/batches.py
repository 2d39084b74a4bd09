"""Token sequences, and the padded batches of them that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batch", "Sample", "Tokens", "longest_first", "make_batches", "pad", "padding_token"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one sequence.

    Args:
        ids: The tokens.
        counted: For each token, whether statistics include it.
    """

    ids: tuple[int, ...]
    counted: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One input of a model.

    Args:
        stacks: One sequence, or one for each stack of an encoder-decoder.
        where: File and line of the record, for messages.
    """

    stacks: tuple[Tokens, ...]
    where: str

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(len(tokens.ids) for tokens in self.stacks)


@dataclass(frozen=True)
class Padded:
    """Sequences of several samples, padded on the right to equal length.

    Args:
        ids: Int64, shape [sequences, longest].
        valid: True for tokens, False for padding, bool, same shape.
        counted: True for tokens that statistics include, bool, same shape; False for padding.
        first: Index of the batch's first token among the tokens of all batches.
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
    """Samples that a model reads in one call.

    Args:
        stacks: The input of each of the model's stacks. An encoder-decoder has two, padded to different lengths, so
            that the shape of a matrix's input shows which stack it belongs to.
        where: File and line of each sample.
    """

    stacks: tuple[Padded, ...]
    where: tuple[str, ...]

    def stack_of(self, shape: Sequence[int]) -> Padded | None:
        """Return the input of the stack whose tokens have this shape, in sequences or one after the other; None if none has.

        Args:
            shape: Shape of an input of a matrix without its last axis. Axes of length 1 do not affect the order of rows.
        """
        rows = _without_ones(shape)
        for padded in self.stacks:
            if rows in (_without_ones(padded.ids.shape), _without_ones((padded.ids.numel(),))):
                return padded
        return None

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of the model's forward; the mask is omitted if there is no padding."""
        names = ("", "decoder_")[: len(self.stacks)]
        found = {f"{name}input_ids": padded.ids for name, padded in zip(names, self.stacks, strict=True)}
        masks = zip(names, self.stacks, strict=True)
        return found | {f"{name}attention_mask": padded.valid.long() for name, padded in masks if not padded.full}


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [length for length in shape if length != 1]


def longest_first(samples: Sequence[Sample]) -> list[int]:
    """Return the indices of samples in the order in which batches take them."""
    return sorted(range(len(samples)), key=lambda i: (-samples[i].longest, i))


def padding_token(config: Any) -> int:
    """Return the padding token that a config of transformers names, or 0 if it names none that the model has."""
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    return pad if isinstance(pad, int) and pad >= 0 and (rows is None or pad < rows) else 0


def make_batches(
    samples: Sequence[Sample], budget: int, pad_id: int, most: int | None = None, *, equal: bool = False
) -> list[Batch]:
    """Divide samples into batches, the longest first: there is little padding, and memory would run out at the start.

    Args:
        samples: The samples.
        budget: Largest number of tokens of a batch, with padding, in its longest stack; a longer sample is a batch of
            its own.
        pad_id: The padding token.
        most: Largest number of samples in a batch; None for no limit but that of tokens.
        equal: Whether a batch holds samples of one length only, so that it has no padding.
    """
    groups: list[list[Sample]] = []
    for sample in (samples[i] for i in longest_first(samples)):
        longest = groups[-1][0].longest if groups else 0
        full = not groups or len(groups[-1]) == most or (len(groups[-1]) + 1) * longest > budget
        if full or (equal and sample.longest < longest):
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
    """Pad sequences to the length of the longest, plus one if that length is in `taken`."""
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
    """Arrange the tokens of a batch in padded sequences.

    Args:
        rows: The tokens of all sequences, concatenated, shape [tokens, width].
        valid: True where the batch has tokens, bool, shape [sequences, longest].

    Returns:
        Shape [sequences, longest, width], zero at padding.
    """
    if len(rows) == valid.numel():
        return rows.view(*valid.shape, -1)
    padded = rows.new_zeros(*valid.shape, rows.shape[-1])
    padded[valid] = rows
    return padded
