"""Texts as rows of tokens, and how well a model predicts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["choices", "nats", "token_rows"]


def token_rows(tokenizer: Any, texts: Sequence[str], length: int, device: torch.device) -> list[Tensor]:
    """Return the tokens of each text, shape [1, at most length]; texts of fewer than two tokens are left out.

    Args:
        tokenizer: The tokenizer of transformers.
        texts: The texts.
        length: Most tokens of a text.
        device: Where the rows are.
    """
    ids = [tokenizer(text, verbose=False)["input_ids"][:length] for text in texts]
    return [torch.tensor([own], device=device) for own in ids if len(own) > 1]


def nats(logits: Callable[[Tensor], Tensor], rows: Sequence[Tensor]) -> float:
    """Return the mean negative log-likelihood of all tokens that have one before them.

    Args:
        logits: Returns the logits of a row, shape [1, length, vocabulary].
        rows: Tokens, shape [1, length].
    """
    total = sum(float(cross_entropy(logits(row)[0, :-1].float(), row[0, 1:], reduction="sum")) for row in rows)
    return total / sum(row.shape[1] - 1 for row in rows)


def choices(weights: Callable[[Tensor], Tensor], rows: Sequence[Tensor], right: int) -> tuple[float, list[float]]:
    """Return the share of texts in which the right task weighs most, and the mean weight of every task.

    Args:
        weights: Returns the weights of the tasks for a row, shape [1, tasks].
        rows: Tokens, shape [1, length].
        right: Number of the task to which the texts belong.
    """
    found = torch.cat([weights(row) for row in rows])
    return float((found.argmax(1) == right).float().mean()), found.mean(0).tolist()
