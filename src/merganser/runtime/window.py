"""Layers of a model whose attention sees the last tokens alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layer import RunningLayer

__all__ = ["WindowLayer"]


class WindowLayer(RunningLayer):
    """A layer that holds what the model's own sliding window sees; nothing is merged, as nothing can grow.

    Args:
        tokens: Tokens that a query sees, with its own.
    """

    is_sliding = True

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add a call's keys and values, return what its attention sees, and drop what no later token sees."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.seen += key_states.shape[-2]
        start = max(0, keys.shape[-2] - self.tokens + 1)
        # a slice alone would hold the memory of what is dropped
        self.keys, self.values = (each[:, :, start:].clone() if start else each for each in (keys, values))
        return keys, values
