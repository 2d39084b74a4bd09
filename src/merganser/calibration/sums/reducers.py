"""Sums over the inputs of a matrix, from which statistics are made.

Each is a sum over tokens, not a mean, so that the sums of two halves of the data add up to those of the whole. Products
and the sum within a batch are float32; sums over batches are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

__all__ = ["REDUCERS", "CrossGram", "Reducer", "products_of"]


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products use a processor's bfloat16 units if all factors were bfloat16.

    This is exact: these units multiply without rounding and add in float32.

    Args:
        dtype: Dtype of the factors before their conversion to float32.
    """
    # torch has this setting since 2.9
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or settings is None:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


# number of panels of the Gram matrix, and limits of their width: fast products, and little memory besides the sum
_PANELS, _NARROWEST, _WIDEST = 8, 256, 1024


class Reducer(Protocol):
    """A sum over the tokens that a matrix receives."""

    stored_as: ClassVar[str]
    """Dtype in files."""

    @staticmethod
    def shape_of(width: int) -> tuple[int, ...]:
        """Return the shape of the sum.

        Args:
            width: Number of features of an input.
        """

    @staticmethod
    def memory_of(width: int) -> int:
        """Return the bytes that the sum takes while it is computed."""

    def __init__(self, width: int) -> None:
        """Begin with a sum of zero.

        Args:
            width: Number of features of an input.
        """

    def add(self, rows: Tensor) -> None:
        """Add the inputs of some tokens, float32, shape [tokens, width]."""

    def result(self) -> Tensor:
        """Return the sum, in the shape of `shape_of`; nothing may be added afterwards."""


class _Vector:
    """A sum of vectors, shape [width]."""

    stored_as: ClassVar[str] = "float64"

    @staticmethod
    def shape_of(width: int) -> tuple[int, ...]:
        """Return the shape of the sum."""
        return (width,)

    @staticmethod
    def memory_of(width: int) -> int:
        """Return the bytes of the sum."""
        return 8 * width

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, dtype=torch.float64)

    def result(self) -> Tensor:
        """Return the sum, shape [width], float64."""
        return self._sum


class Magnitude(_Vector):
    """Sum of magnitudes, `Σ |x|`, shape [width]."""

    def add(self, rows: Tensor) -> None:
        """Add `|x|` of every row."""
        self._sum += rows.abs().sum(0)


class SecondMoment(_Vector):
    """Sum of squares, `Σ x²`: the diagonal of the Gram matrix, shape [width]."""

    def add(self, rows: Tensor) -> None:
        """Add `x²` of every row."""
        self._sum += rows.square().sum(0)


class Gram:
    """Gram matrix, `Σ x xᵀ`, shape [width, width].

    The matrix is symmetric, so only its upper half is summed, in panels of rows from the diagonal to the right: such
    products take a little less time than those of columns from the diagonal downwards.
    """

    stored_as: ClassVar[str] = "float32"

    @staticmethod
    def shape_of(width: int) -> tuple[int, ...]:
        """Return the shape of the sum."""
        return (width, width)

    @staticmethod
    def memory_of(width: int) -> int:
        """Return the bytes of the panels."""
        step = _step(width)
        return sum(8 * (width - start) * min(step, width - start) for start in range(0, width, step))

    def __init__(self, width: int) -> None:
        self.width = width
        step = _step(width)
        self._panels = {
            start: torch.zeros(min(step, width - start), width - start, dtype=torch.float64)
            for start in range(0, width, step)
        }

    def add(self, rows: Tensor) -> None:
        """Add `x xᵀ` of every row."""
        for start, panel in self._panels.items():
            panel += rows[:, start : start + len(panel)].T @ rows[:, start:]

    def result(self) -> Tensor:
        """Return the sum with its lower half, shape [width, width], float32."""
        found = torch.empty(self.shape_of(self.width), dtype=torch.float32)
        while self._panels:
            start, panel = self._panels.popitem()
            end = start + len(panel)
            found[start:end, start:] = panel
            found[end:, start:end] = found[start:end, end:].T
            # both halves of the diagonal block were summed, and may differ in the last bit; copy one to the other
            block = found[start:end, start:end]
            block.copy_(block.triu() + block.triu(1).T)
        return found


def _step(width: int) -> int:
    """Return the width of a panel."""
    return min(max(-(-width // _PANELS), _NARROWEST), _WIDEST)


REDUCERS: dict[str, type[Reducer]] = {"magnitude": Magnitude, "second_moment": SecondMoment, "gram": Gram}
"""Classes of sums by the name of the statistic."""


class CrossGram:
    """Cross moment, `Σ x yᵀ`, of two inputs that belong to the same tokens, shape [width, width]."""

    stored_as: ClassVar[str] = "float32"

    @staticmethod
    def shape_of(width: int) -> tuple[int, ...]:
        """Return the shape of the sum."""
        return (width, width)

    @staticmethod
    def memory_of(width: int) -> int:
        """Return the bytes of the sum."""
        return 8 * width**2

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor, others: Tensor) -> None:
        """Add `x yᵀ` of every row x and the row y beside it, float32, shape [tokens, width]."""
        for start in range(0, len(self._sum), _WIDEST):
            self._sum[start : start + _WIDEST] += rows[:, start : start + _WIDEST].T @ others

    def result(self) -> Tensor:
        """Return the sum, shape [width, width], float64; it is stored in float32."""
        return self._sum
