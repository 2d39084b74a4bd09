"""Batches: what is fed to a model at once, and the logits that are kept of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .outcome import Outcome

LOGITS = 1 << 27
"""Most logits of a batch, elements: with 2 bytes each a quarter of a gigabyte."""


class Refused(Exception):
    """A model gave nothing that could be scored; the message says what."""


class Prepared(Protocol):
    """A task in the tokens of a model."""

    @property
    def batches(self) -> Sequence[Sequence[int]]:
        """Indices of rows, batch by batch."""

    def measure(self, model: Any, rows: Sequence[int]) -> dict[str, Any]:
        """Score rows on a loaded model; the result is plain data, for a journal.

        Raises:
            Refused: The model gives nothing that can be scored.
        """

    def outcome(self, contents: Sequence[Mapping[str, Any]]) -> Outcome:
        """Make the outcome of what every batch gave."""


def in_order(rows: Sequence[Sequence[int]], contents: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Put the columns of batches together, in the order of their rows."""
    count = sum(map(len, rows))
    columns: dict[str, list[Any]] = {name: [None] * count for name in (contents[0] if contents else ())}
    for batch, content in zip(rows, contents, strict=True):
        for name, values in content.items():
            for row, value in zip(batch, values, strict=True):
                columns[name][row] = value
    return columns


def batches(fed: Sequence[int], kept: Sequence[int], vocabulary: int, budget: int) -> list[list[int]]:
    """Divide rows into batches, the longest first: what does not fit memory fails at once.

    The division depends on nothing but the arguments, so that a row's neighbours, and with them its last digits, are
    the same in a run that was continued.

    Args:
        fed: Tokens that each row feeds.
        kept: Tokens of which the logits are needed, by row.
        vocabulary: Logits per token.
        budget: Tokens that a batch may feed, padding included; a longer row is a batch by itself.

    Returns:
        Indices of rows.
    """
    found: list[list[int]] = []
    width = most = 0
    for index in sorted(range(len(fed)), key=lambda i: (-fed[i], -kept[i], i)):
        rows = len(found[-1]) + 1 if found else 1
        most = max(most, kept[index])
        if not found or rows * width > budget or rows * most * vocabulary > LOGITS:
            found.append([])
            width, most = fed[index], kept[index]
        found[-1].append(index)
    return found


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return rows of tokens as one tensor, int64, shape [rows, longest]; a causal model does not see the padding."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def logits_at(model: Any, places: Tensor, **inputs: Any) -> Tensor:
    """Return the logits at some places of every row.

    Args:
        model: A causal language model of transformers.
        places: Places in the rows, int64, shape [places].
        **inputs: What to feed.

    Returns:
        Shape [rows, places, vocabulary].
    """
    with torch.inference_mode():
        if takes(model, "logits_to_keep"):
            return model(**inputs, use_cache=False, logits_to_keep=places).logits  # type: ignore[no-any-return]
        return model(**inputs, use_cache=False).logits[:, places]  # type: ignore[no-any-return]


def takes(model: Any, name: str) -> bool:
    """Whether a model takes an argument of that name."""
    return name in inspect.signature(model.forward).parameters
