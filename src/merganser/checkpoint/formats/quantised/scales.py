"""Scales of blocks of a weight, whatever the blocks are: the tensor, matrices, rows, groups of columns, or tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...derived.derived import read_rows
from ...tensor import ByteReader, TensorInfo
from .pool import flaw

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Scaled", "Scales", "scales_of", "to_float"]

_FLOATS = ("float32", "bfloat16", "float16", "float64", "float8_e8m0fnu", "float8_e4m3fn", "float8_e5m2", "uint8")
_TILE = 128


@dataclass(frozen=True, slots=True)
class Scales:
    """A stored tensor of scales, and how its entries lie on the weight.

    Args:
        tensor: The scales; all dimensions but the last two count matrices.
        rows: Rows of one matrix of the weight.
        columns: Columns of the weight.
        grid: Rows and columns of the scales of one matrix.
        block: Rows and columns of the weight per scale; the last block may be smaller.
        shared: Whether all matrices have the same scales.
    """

    tensor: TensorInfo
    rows: int
    columns: int
    grid: tuple[int, int]
    block: tuple[int, int]
    shared: bool

    def at(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return the scales of rows of the weight (matrices one below the other): float32, [rows, columns or 1]."""
        import torch

        places = torch.arange(first, end)
        within = (places % self.rows) // self.block[0]
        lines = within if self.shared else places // self.rows * self.grid[0] + within
        low, high = int(lines.min()), int(lines.max())
        flat = replace(self.tensor, shape=(self.tensor.numel // self.grid[1], self.grid[1]))
        found = to_float(read_rows(reader, flat, low, high + 1))[lines - low]
        if self.grid[1] == 1 or self.block[1] == 1:
            return found
        return found.repeat_interleave(self.block[1], 1)[:, : self.columns]


@dataclass(frozen=True, slots=True)
class Scaled:
    """Rows of a weight whose stored numbers are not packed: `W = (q - zero) * scale`, or `q * scale` without zeros."""

    weight: TensorInfo
    scales: Scales
    zeros: Scales | None = None

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return rows of the weight (matrices one below the other): float32, [rows, columns]."""
        values = read_rows(reader, self.weight, first, end).float()
        if self.zeros is not None:
            values -= self.zeros.at(reader, first, end)
        return values * self.scales.at(reader, first, end)


def to_float(scales: Tensor) -> Tensor:
    """Return stored scales as float32; bytes are powers of two with a bias of 127."""
    import torch

    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def scales_of(
    weight: TensorInfo, shape: tuple[int, ...], scale: TensorInfo, block: tuple[int, int] | None = None
) -> Scales:
    """Find out which part of a weight each scale belongs to.

    Args:
        weight: The stored weight, for messages.
        shape: The logical shape of the weight, two dimensions or more.
        scale: Its scales.
        block: Rows and columns of a tile, if the config gives them.

    Raises:
        CheckpointError: The scales fit no way of dividing the weight.
    """
    if len(shape) < 2 or scale.dtype.name not in _FLOATS:
        what = f"scales must be floats, found {scale.dtype.name}" if len(shape) > 1 else "only matrices have scales"
        raise flaw(scale, what)
    *lead, rows, columns = shape
    matrices = math.prod(lead)
    grid, shared = _grid(scale.shape, tuple(lead), rows)
    tiles = (block,) if block is not None else ((_TILE, _TILE),)
    fits = [size for size in tiles if grid is not None and grid == (-(-rows // size[0]), -(-columns // size[1]))]
    if grid is not None and fits and block is not None:
        return Scales(scale, rows, columns, grid, fits[0], shared)
    if grid is not None and grid[0] in (1, rows):
        height = rows if grid[0] == 1 else 1
        if grid[1] == 1 or (grid[1] and columns % grid[1] == 0):
            return Scales(scale, rows, columns, grid, (height, columns // grid[1]), shared)
    if grid is not None and fits:
        return Scales(scale, rows, columns, grid, fits[0], shared)
    expected = f"tiles of {tiles[0][0]} x {tiles[0][1]}" if matrices else "the weight"
    raise flaw(
        scale,
        f"shape {list(scale.shape)} fits neither the tensor, the rows, groups of columns, nor {expected} of weight "
        f"{weight.name!r} {list(shape)}",
    )


def _grid(scale: tuple[int, ...], lead: tuple[int, ...], rows: int) -> tuple[tuple[int, int] | None, bool]:
    """Return the rows and columns of the scales of one matrix, and whether the matrices share them; None: no fit."""
    matrices = math.prod(lead)
    if math.prod(scale) == 1:
        return (1, 1), True
    if lead and math.prod(scale) == matrices:
        return (1, 1), False
    if len(scale) == 1 and not lead and scale[0] == rows:
        return (rows, 1), False
    if len(scale) == len(lead) + 2 and scale[: len(lead)] == lead:
        return (scale[-2], scale[-1]), False
    if len(scale) == len(lead) + 1 and lead and scale == (*lead, rows):
        return (rows, 1), False
    return None, False
