"""Batches of token sequences, and the logits that a model computes for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .outcome import Outcome

LOGITS = 1 << 27
"""Largest number of logits of a batch, in elements: a quarter of a gigabyte at 2 bytes each."""


class Refused(Exception):
    """A model's output cannot be scored; the message says why."""


class Scorable(Protocol):
    """A task of which some items can be scored without the others."""

    @property
    def items(self) -> Sequence[Any]:
        """Identifier of each item."""

    def measure_items(self, model: Any, items: Sequence[int]) -> dict[str, list[float]]:
        """Score some items on a loaded model; return their measurements by name, in the order of `items`.

        Raises:
            Refused: The model's output cannot be scored.
        """


class Prepared(Scorable, Protocol):
    """A task, tokenised for a model."""

    @property
    def batches(self) -> Sequence[Sequence[int]]:
        """Indices of rows, batch by batch."""

    def prompt(self, row: int) -> Sequence[int]:
        """Return the tokens of a row that a model gets before it is asked: those by which a task is chosen for it."""

    def measure(self, model: Any, rows: Sequence[int]) -> dict[str, Any]:
        """Score rows on a loaded model; the result can be written to the journal as JSON.

        Raises:
            Refused: The model's output cannot be scored.
        """

    def outcome(self, contents: Sequence[Mapping[str, Any]]) -> Outcome:
        """Return the outcome of the task from the results of all batches."""


def in_order(rows: Sequence[Sequence[int]], contents: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Concatenate the columns of batches, in the order of the rows before batching."""
    count = sum(map(len, rows))
    columns: dict[str, list[Any]] = {name: [None] * count for name in (contents[0] if contents else ())}
    for batch, content in zip(rows, contents, strict=True):
        for name, values in content.items():
            for row, value in zip(batch, values, strict=True):
                columns[name][row] = value
    return columns


def batches(fed: Sequence[int], kept: Sequence[int], vocabulary: int, budget: int) -> list[list[int]]:
    """Divide rows into batches, the longest rows first, so that too little memory is noticed at once.

    The batches depend only on the arguments. A continued run therefore has the same batches, and the results of a row,
    which rounding makes depend on its batch, are the same to the last digit.

    Args:
        fed: Number of input tokens of each row.
        kept: Number of tokens of each row whose logits are needed.
        vocabulary: Number of logits per token.
        budget: Largest number of input tokens of a batch, including padding; a longer row is a batch by itself.

    Returns:
        Indices of rows.
    """
    grouped: list[list[int]] = []
    width = most = 0
    for index in sorted(range(len(fed)), key=lambda i: (-fed[i], -kept[i], i)):
        rows = len(grouped[-1]) + 1 if grouped else 1
        most = max(most, kept[index])
        if not grouped or rows * width > budget or rows * most * vocabulary > LOGITS:
            grouped.append([])
            width, most = fed[index], kept[index]
        grouped[-1].append(index)
    return grouped


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return rows of tokens as one tensor, padded at the right, which causal models ignore: int64, [rows, longest]."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def logits_at(model: Any, places: Tensor, **inputs: Any) -> Tensor:
    """Return the logits at some positions of every row.

    Args:
        model: A causal language model of transformers.
        places: Positions in the rows, int64, shape [places].
        **inputs: Inputs of the model, such as `input_ids`.

    Returns:
        Shape [rows, places, vocabulary].
    """
    with torch.inference_mode():
        if takes(model, "logits_to_keep"):
            return model(**inputs, use_cache=False, logits_to_keep=places).logits  # type: ignore[no-any-return]
        return model(**inputs, use_cache=False).logits[:, places]  # type: ignore[no-any-return]


def takes(model: Any, name: str) -> bool:
    """Return whether the model's forward method takes an argument of that name."""
    return name in inspect.signature(model.forward).parameters
