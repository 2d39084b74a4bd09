"""Sums of gradients over sequences, by parameter of the model, as the checkpoint's tensors are laid out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..writer import Sum
from .parameters import Part

__all__ = ["ELEMENTWISE", "GradientSums"]

ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "fisher": torch.square,
    "gradient": lambda gradient: gradient,
    "absolute_gradient": torch.abs,
}
"""What is summed over sequences, for each entry of a tensor: a function of the gradient of one sequence's loss."""


class GradientSums:
    """Sums over sequences of the gradients of some parameters, float64.

    Args:
        parameters: The parameters.
        parts: The checkpoint's tensors that they are made of.
        statistics: Names of statistics: those in `ELEMENTWISE`, and `sensitivity`; others are ignored.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], parts: Mapping[str, Part], statistics: Sequence[str]
    ) -> None:
        self.parts = parts
        self._wanted = [name for name in ELEMENTWISE if name in statistics]
        self._sensitivity = "sensitivity" in statistics
        needed = {*self._wanted, *(["absolute_gradient"] if self._sensitivity else [])}
        used = {part.parameter for part in parts.values()}
        self._parameters = {name: own for name, own in parameters.items() if name in used}
        self._sums = {
            (statistic, name): torch.zeros(own.shape, dtype=torch.float64)
            for statistic in ELEMENTWISE
            if statistic in needed
            for name, own in self._parameters.items()
        }

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients of one sequence's loss, by parameter; missing ones are zero."""
        for (statistic, name), total in self._sums.items():
            if name in gradients:
                total += ELEMENTWISE[statistic](gradients[name])

    def results(self) -> dict[tuple[str, str], Sum]:
        """Return the sums by statistic and tensor; the parameters must still be loaded."""
        found: dict[tuple[str, str], Sum] = {}
        for source, part in self.parts.items():
            for statistic in self._wanted:
                whole = self._sums[statistic, part.parameter]
                found[statistic, source] = Sum(tuple(part.of(whole).shape), "float32", partial(part.of, whole))
            if self._sensitivity:
                magnitude = part.of(self._sums["absolute_gradient", part.parameter])
                weight = part.of(self._parameters[part.parameter].detach())
                total = (magnitude * weight.abs()).sum()
                found["sensitivity", source] = Sum((), "float64", partial(total.clone))
        return found
