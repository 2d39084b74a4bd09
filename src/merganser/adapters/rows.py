"""Rows of a weight with an adapter, computed while they are read: a block of the base and the factors are in memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import TensorInfo
from ..checkpoint.derived.derived import read_rows, read_whole, rows_of
from ..checkpoint.tensor import ByteReader

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["AddedRows", "Product", "ScaledRows", "added_factors"]

_SLAB = 1 << 19


@dataclass(frozen=True, slots=True)
class Product:
    """scale * B A in the layout of a stored weight.

    Args:
        a: A, shape [experts * r, in].
        b: B, shape [out, r * experts].
        scale: The scale.
        transposed: Whether the weight is stored as [in, out].
        experts: Number of packed experts; 1 for a matrix. In A the rows of an expert follow each other, in B every
            column belongs to the next expert.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    experts: int = 1

    def factors(self, reader: ByteReader, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return left and right factors, shapes [experts, rows, r] and [experts, r, columns]."""
        a, b = read_whole(reader, self.a).to(dtype), read_whole(reader, self.b).to(dtype)
        a = a.view(self.experts, -1, a.shape[1])
        b = b.view(b.shape[0], -1, self.experts).permute(2, 0, 1)
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        return left.contiguous(), right.contiguous()


class _Last(threading.local):
    """The factors that a thread used last, by adapter, since the blocks of a tensor are read one after another."""

    def __init__(self) -> None:
        self.of: dict[Path, tuple[Product, tuple[Tensor, Tensor]]] = {}


_LAST = _Last()


@dataclass(eq=False)
class AddedRows:
    """Rows of W + scale * B A, with lengths of |length| (W + scale * B A) / |W + scale * B A| over each output.

    The sum is computed in `dtype`, and not rounded to that of the base.

    Args:
        base: W, shape [rows, columns], or [experts, rows, columns].
        product: The product; None if only other values replace the base's.
        dtype: float32, or float64 if one of the tensors is.
        lengths: Lengths of the outputs; None without.
    """

    base: TensorInfo
    product: Product
    dtype: Any
    lengths: TensorInfo | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _norms: Tensor | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple[type[AddedRows], tuple[Any, ...]]:
        return AddedRows, (self.base, self.product, self.dtype, self.lengths)

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return rows, those of packed experts one expert after another, shape [end - first, columns]."""
        import torch

        rows = self._sum(reader, first, end)
        if self.lengths is None:
            return rows
        wanted = read_whole(reader, self.lengths).to(self.dtype).view(-1)
        if self.product.transposed:
            return rows * (wanted / self._column_norms(reader))
        lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return rows * (wanted[first:end] / lengths).unsqueeze(1)

    def _sum(self, reader: ByteReader, first: int, end: int) -> Tensor:
        import torch

        left, right = self._factors(reader, last=end == self.base.numel // self.base.shape[-1])
        height = self.base.shape[-2]
        found = read_rows(reader, self.base, first, end).to(self.dtype)
        for expert in range(first // height, -(-end // height)):
            low, high = max(first, expert * height), min(end, (expert + 1) * height)
            part = found[low - first : high - first]
            own = left[expert, low - expert * height : high - expert * height]
            torch.addmm(part, own, right[expert], alpha=self.product.scale, out=part)
        return found

    def _factors(self, reader: ByteReader, *, last: bool) -> tuple[Tensor, Tensor]:
        """Return the factors, read once for blocks that follow each other; forget them with the last block."""
        adapter = self.product.a.file
        product, factors = _LAST.of.get(adapter, (None, None))
        if factors is None or product is not self.product:
            factors = self.product.factors(reader, self.dtype)
        _LAST.of[adapter] = self.product, factors
        if last:
            del _LAST.of[adapter]
        return factors

    def _column_norms(self, reader: ByteReader) -> Tensor:
        """Return the lengths of the columns of the whole sum, which takes a pass over it; computed once."""
        import torch

        with self._lock:
            if self._norms is None:
                height, width = self.base.shape
                step = max(1, _SLAB // width)
                squares = torch.zeros(width, dtype=torch.float64)
                for first in range(0, height, step):
                    squares += self._sum(reader, first, min(first + step, height)).double().square().sum(dim=0)
                self._norms = squares.sqrt().to(self.dtype)
        return self._norms


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """Rows of a weight or bias of which every row, or every column, is multiplied by a number (IA3).

    Args:
        base: The weight, shape [rows, columns], or a bias.
        factors: The numbers.
        by_row: Whether they belong to rows; else to columns, or to the entries of a bias.
        dtype: float32, or float64 if one of the tensors is.
    """

    base: TensorInfo
    factors: TensorInfo
    by_row: bool
    dtype: Any

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return rows, shape [end - first, columns]."""
        rows = read_rows(reader, self.base, first, end).to(self.dtype)
        factors = read_whole(reader, self.factors).to(self.dtype).view(-1)
        return rows * (factors[first:end].unsqueeze(1) if self.by_row else factors)


def added_factors(tensor: TensorInfo, base: TensorInfo, reader: ByteReader) -> tuple[Tensor, Tensor] | None:
    """Return the factors of a product that is added to a matrix of the base, if the tensor is that sum and nothing else.

    Args:
        tensor: A tensor of a model with an adapter.
        base: The tensor of the model without it.
        reader: Reads the factors.

    Returns:
        Left factor with the scale, and right factor, float32, shapes [rows, r] and [r, columns].
    """
    import torch

    rows = rows_of(tensor)
    if not isinstance(rows, AddedRows) or rows.base != base or rows.lengths is not None or rows.product.experts > 1:
        return None
    left, right = rows.product.factors(reader, torch.float32)
    return left[0] * rows.product.scale, right[0]
