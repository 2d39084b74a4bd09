"""Coefficients that are learnt by gradients of a loss of the whole merged model: what a method says of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Learning"]


@dataclass(frozen=True, slots=True)
class Learning:
    """How the coefficients of a method are learnt.

    The function of the method says how weights are made of coefficients; it is differentiated with respect to them. The
    functions here name the parameters of the method that they take, which are those of all tensors.

    Args:
        loss: Returns the loss of every predicted token, shape [tokens]. It may take `logits`, of the merged model, float32,
            shape [tokens, vocabulary]; `teacher`, those of the model whose data it is; and `labels`, the tokens that
            follow in the text, int64, shape [tokens].
        start: Returns the first value of all coefficients. It may take `count`, the number of models.
        over: What has coefficients of its own, one for each model: "model", "layer", "tensor"; "column", which is each
            input of a matrix, and other tensors as a whole; "chunk", which is each of as many pieces of consecutive elements
            of a tensor as the parameter `chunks` says; or the name of the parameter that says one of the first three.
        penalty: Returns what is added to the loss, 0-d. It takes `coefficients`: for whatever has its own, a tensor of
            shape [models, numbers], float32.
        update: Returns the next coefficients of whatever has its own, in place of Adam, shape [models, numbers]. It may take
            `values`, those so far; `gradients`, the gradient of each model's loss, times its weight, with respect to them,
            shape [losses, models, numbers]; and `number`, that of the step, from 0.

    Raises:
        ValueError: There is a penalty beside an update, which does not know of it.
    """

    loss: Callable[..., Tensor]
    start: Callable[..., Any]
    over: str = "tensor"
    penalty: Callable[..., Tensor] | None = None
    update: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if self.penalty is not None and self.update is not None:
            raise ValueError("penalty: only Adam lowers it; with an update of its own a method adds none")

    @property
    def has_teacher(self) -> bool:
        """Whether the loss compares the merged model with the models."""
        return "teacher" in inspect.signature(self.loss).parameters

    @property
    def by_model(self) -> bool:
        """Whether a step needs the gradient of each model's loss by itself; Adam takes that of their sum."""
        return self.update is not None

    @property
    def needed(self) -> set[str]:
        """Parameters that the method declares.

        Sequences of each model in a step, step size, number of steps, and per model the factor of its loss; where chunks have
        coefficients, into how many a tensor is cut.
        """
        return {"batch", "rate", "steps", "weight", *(["chunks"] if self.over == "chunk" else [])}

    def chunks(self, parameters: Mapping[str, Any]) -> int:
        """Return how many pieces of consecutive elements of a tensor have coefficients of their own.

        Args:
            parameters: All parameters, by their names in recipes.
        """
        return int(parameters["chunks"]) if self.over == "chunk" else 1

    def granularity(self, parameters: Mapping[str, Any]) -> str:
        """Return what has coefficients of its own: "model", "layer", "tensor", "column" or "chunk".

        Args:
            parameters: All parameters, by their names in recipes.
        """
        return str(parameters.get(self.over, self.over))
