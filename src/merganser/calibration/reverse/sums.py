"""Sums of gradients over sequences, by parameter of the model, as the checkpoint's tensors are laid out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ...errors import NonFiniteError
from ..output.writer import Sum
from .gradient import Gradient
from .parameters import Part

__all__ = ["ELEMENTWISE", "PIECE", "GradientSums", "most_waiting", "tables"]

ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fisher": lambda total, gradient: total.addcmul_(gradient, gradient),
    "gradient": lambda total, gradient: total.add_(gradient),
    "absolute_gradient": lambda total, gradient: total.add_(gradient.abs()),
}
"""By statistic, the function that adds the gradient of one sequence's loss to the sum over sequences, both float64."""

PIECE = 1 << 17
"""Entries of a gradient for each thread that are formed and summed at a time: as many as a processor's cache holds."""

# the factors of gradients wait, until they are about as large as the parameters, so that a sum is read from memory once
# for several sequences
_LEAST_WAITING = 32 << 20


def tables(statistics: Sequence[str]) -> list[str]:
    """Return which sums are held in memory for some statistics: a sensitivity is made of absolute gradients."""
    needed = {*statistics, *(["absolute_gradient"] if "sensitivity" in statistics else [])}
    return [name for name in ELEMENTWISE if name in needed]


def most_waiting(entries: int) -> int:
    """Return how many bytes of gradients wait at most, given the number of entries of all parameters."""
    return max(4 * entries, _LEAST_WAITING)


class GradientSums:
    """Sums over sequences of the gradients of some parameters, float64.

    Args:
        parameters: The parameters.
        parts: The checkpoint's tensors that they are made of.
        statistics: Names of statistics: those in `ELEMENTWISE`, and `sensitivity`; others are ignored.
        place: What the parameters are part of, for messages.
        totals: Sums so far, as `totals` returned them; None to begin with zero.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        parts: Mapping[str, Part],
        statistics: Sequence[str],
        place: str,
        totals: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.parts = parts
        self._wanted = [name for name in ELEMENTWISE if name in statistics]
        self._sensitivity = "sensitivity" in statistics
        self._place = place
        used = {part.parameter for part in parts.values()}
        needed = tables(statistics)
        self._parameters = {name: own for name, own in parameters.items() if name in used and needed}
        self._sums = totals or {
            statistic: {name: torch.zeros(own.shape, dtype=torch.float64) for name, own in self._parameters.items()}
            for statistic in needed
        }
        self._most = most_waiting(sum(own.numel() for own in self._parameters.values()))
        self._waiting: list[tuple[str, Mapping[str, Gradient]]] = []
        self._held: dict[int, int] = {}

    def add(self, gradients: Mapping[str, Gradient], where: str) -> None:
        """Add the gradients of one sequence's loss.

        Args:
            gradients: By parameter; missing ones are zero.
            where: File and line of the sequence.

        Raises:
            NonFiniteError: A gradient is NaN or infinite.
        """
        own = {name: gradient for name, gradient in gradients.items() if name in self._parameters}
        if not own:
            return
        every = [tensor for gradient in own.values() for tensor in gradient.tensors()]
        # matrices that receive the same have a factor in common
        held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in every}
        if self._waiting and sum({**self._held, **held}.values()) > self._most:
            self._form()
        self._waiting.append((where, own))
        self._held |= held

    def totals(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the sums of what was added, by table and parameter."""
        self._form()
        return self._sums

    @torch.no_grad()
    def _form(self) -> None:
        """Form the gradients that wait, and add them, each sequence by itself."""
        for name in self._parameters:
            waiting = [(where, gradients[name]) for where, gradients in self._waiting if name in gradients]
            for where, gradient in waiting:
                if gradient.only_rows:
                    self._add_rows(name, gradient, where)
            if whole := [pair for pair in waiting if not pair[1].only_rows]:
                self._add_whole(name, whole)
        self._waiting.clear()
        self._held.clear()

    def _add_rows(self, name: str, gradient: Gradient, where: str) -> None:
        """Add a gradient of which only some rows are not zero."""
        if gradient.rows is None:
            return
        indices, values = gradient.rows
        self._check(values, where)
        for statistic, totals in self._sums.items():
            totals[name][indices] = ELEMENTWISE[statistic](totals[name][indices], values.double())

    def _add_whole(self, name: str, gradients: Sequence[tuple[str, Gradient]]) -> None:
        parameter = self._parameters[name]
        in_rows = any(gradient.products or gradient.rows is not None for _, gradient in gradients)
        width = parameter.numel() // max(len(parameter), 1) if in_rows else 1
        totals = [(ELEMENTWISE[statistic], own[name].view(-1, width)) for statistic, own in self._sums.items()]
        count = parameter.numel() // max(width, 1)
        step = min(max(PIECE * torch.get_num_threads() // max(width, 1), 1), max(count, 1))
        narrow, wide = torch.empty(step, width), torch.empty(step, width, dtype=torch.float64)
        for start in range(0, count, step):
            end = min(start + step, count)
            for where, gradient in gradients:
                gradient.into(narrow[: end - start], start)
                self._check(narrow[: end - start], where)
                formed = wide[: end - start].copy_(narrow[: end - start])
                for add, total in totals:
                    add(total[start:end], formed)

    def _check(self, values: Tensor, where: str) -> None:
        # a sum is several times faster than a test of every entry
        if not math.isfinite(float(values.sum())) and not bool(values.isfinite().all()):
            raise NonFiniteError(
                f"{where}: the gradient of the loss is NaN or infinite for this text, in {self._place}"
            )

    def results(self) -> dict[tuple[str, str], Sum]:
        """Return the sums by statistic and tensor; the parameters must still be loaded."""
        sums = self.totals()
        found: dict[tuple[str, str], Sum] = {}
        for source, part in self.parts.items():
            for statistic in self._wanted:
                whole = sums[statistic][part.parameter]
                found[statistic, source] = Sum(tuple(part.of(whole).shape), "float32", partial(part.of, whole))
            if self._sensitivity:
                magnitude = part.of(sums["absolute_gradient"][part.parameter])
                weight = part.of(self._parameters[part.parameter].detach())
                total = (magnitude * weight.abs()).sum()
                found["sensitivity", source] = Sum((), "float64", partial(total.clone))
        return found
