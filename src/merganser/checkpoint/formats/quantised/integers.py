"""Whole numbers with scales, as compressed-tensors stores them: `W = (q - zero) * scale`.

int8 as they are (`weight`), or 2 to 8 bits packed along the input into int32 (`weight_packed`), stored with 2^(bits - 1)
added. `weight_shape` gives the true width. Zero points are packed along the rows. Old files keep each number of 3, 5, 6
or 7 bits within one word. Also int8 with the largest magnitude of each row, as bitsandbytes stores it (`SCB`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....errors import CheckpointError
from ....wording import brief
from ...derived.derived import read_elements, read_rows, read_whole
from ...reader import Reader
from ...tensor import ByteReader, TensorInfo
from .bits import unpack, unpack_apart, words_for
from .noise import StepNoise
from .pool import Pool, flaw
from .scales import Scaled, Scales, scales_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_integers"]


@dataclass(frozen=True, slots=True)
class _Packed:
    """Args: as the module says; `groups` maps each column to its group, where the file does."""

    weight: TensorInfo
    scales: Scales
    zeros: TensorInfo | None
    groups: TensorInfo | None
    columns: int
    bits: int
    apart: bool

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        half = 1 << self.bits - 1
        values = (self._numbers(read_rows(reader, self.weight, first, end), self.columns) - half).float()
        order = None if self.groups is None else read_whole(reader, self.groups).long()
        if self.zeros is not None:
            values -= self._spread((self._zeros(reader, first, end) - half).float(), order)
        if order is None:
            return values * self.scales.at(reader, first, end)
        return values * read_rows(reader, self.scales.tensor, first, end).float()[:, order]

    def _numbers(self, words: Tensor, count: int) -> Tensor:
        return (unpack_apart if self.apart else unpack)(words, self.bits, count)

    def _zeros(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return the zero points of rows; a column of words holds those of consecutive rows."""
        assert self.zeros is not None
        # start at a word in which a number begins: 32 numbers fill `bits` words
        each = 32 // self.bits if self.apart else 32
        per = 1 if self.apart else self.bits
        low = first // each
        words = read_rows(reader, self.zeros, low * per, min(-(-end // each) * per, self.zeros.shape[0]))
        return self._numbers(words.T.contiguous(), end - low * each)[:, first - low * each :].T

    def _spread(self, groups: Tensor, order: Tensor | None) -> Tensor:
        """Return a value per column from one per group."""
        if order is not None:
            return groups[:, order]
        return groups if groups.shape[1] == 1 else groups.repeat_interleave(self.columns // groups.shape[1], 1)


@dataclass(frozen=True, slots=True)
class _PerRow:
    """int8 with the largest magnitude of each row, as bitsandbytes stores it."""

    weight: TensorInfo
    largest: TensorInfo

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        largest = read_elements(reader, self.largest, first, end)
        # bitsandbytes multiplies by this number, not by 1 / 127
        return read_rows(reader, self.weight, first, end) * largest[:, None] * 7.874015718698502e-3


def read_integers(pool: Pool) -> None:
    """Take every weight of whole numbers with its scales.

    Raises:
        CheckpointError: Scales, zero points or shapes are missing or do not fit.
    """
    for name in pool.ending(".weight_packed"):
        if pool.stored[name].dtype.name == "int32":
            _read_packed(pool, pool.stored[name])
    for name in pool.ending(".weight"):
        weight = pool.stored[name]
        if weight.dtype.name != "int8":
            continue
        largest, scale = pool.find(f"{name.removesuffix('.weight')}.SCB"), pool.find(f"{name}_scale")
        if largest is not None:
            _read_per_row(pool, weight, largest)
        elif scale is not None:
            _read_plain(pool, weight, scale)


def _read_per_row(pool: Pool, weight: TensorInfo, largest: TensorInfo) -> None:
    if len(weight.shape) != 2 or largest.shape != weight.shape[:1] or largest.dtype.name != "float32":
        raise flaw(largest, f"must be float32 with one number per row of the weight, {list(weight.shape)}")
    noise = StepNoise(weight.shape[1], 254, symmetric=True)
    pool.make(
        weight.name, weight.shape, [weight, largest], _PerRow(weight, largest), scheme="int8 per row", noise=noise
    )


def _read_plain(pool: Pool, weight: TensorInfo, scale: TensorInfo) -> None:
    scales = scales_of(weight, weight.shape, scale)
    zeros = pool.find(f"{weight.name}_zero_point")
    if zeros is not None and (zeros.shape != scale.shape or zeros.dtype.name not in ("int8", "int32", "int64")):
        raise flaw(zeros, f"must be whole numbers of the shape of the scales, {list(scale.shape)}")
    lie = (
        None if zeros is None else Scales(zeros, scales.rows, scales.columns, scales.grid, scales.block, scales.shared)
    )
    noise = StepNoise(scales.block[1], 254, symmetric=zeros is None)
    scheme = f"int8 in groups of {scales.block[1]}" if scales.block[1] < scales.columns else "int8"
    pool.make(
        weight.name, weight.shape, [weight, scale, zeros], Scaled(weight, scales, lie), scheme=scheme, noise=noise
    )


def _read_packed(pool: Pool, packed: TensorInfo) -> None:
    stem = packed.name.removesuffix("_packed")
    scale = pool.need(packed, "its scales", f"{stem}_scale")
    shape_info = pool.need(packed, "its shape", f"{stem}_shape")
    if len(packed.shape) != 2:
        raise flaw(packed, f"must be a matrix of int32, found shape {list(packed.shape)}")
    shape = _stored_shape(shape_info)
    bits, apart = _bits(pool, packed, shape)
    zeros, groups = pool.find(f"{stem}_zero_point"), pool.find(f"{stem}_g_idx")
    scales = scales_of(packed, shape, scale)
    if zeros is not None:
        lines = -(-shape[0] // (32 // bits)) if apart else words_for(shape[0], bits)
        wanted = (lines, scales.grid[1])
        if zeros.dtype.name != "int32" or zeros.shape != wanted or scales.grid[0] != shape[0]:
            raise flaw(zeros, f"must be int32 of shape {list(wanted)}, found {zeros.dtype.name} {list(zeros.shape)}")
    if groups is not None:
        _check_groups(groups, shape, scales)
    pool.make(
        stem,
        shape,
        [packed, scale, shape_info, zeros, groups],
        _Packed(weight=packed, scales=scales, zeros=zeros, groups=groups, columns=shape[1], bits=bits, apart=apart),
        scheme=f"int{bits} in groups of {scales.block[1]}",
        noise=StepNoise(scales.block[1], (1 << bits) - 1, symmetric=zeros is None),
    )


def _check_groups(groups: TensorInfo, shape: tuple[int, int], scales: Scales) -> None:
    if groups.shape != (shape[1],) or groups.dtype.name not in ("int32", "int64"):
        raise flaw(groups, f"must be one whole number per column, {shape[1]}")
    with Reader() as reader:
        found = read_whole(reader, groups)
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < scales.grid[1]:
        raise flaw(groups, f"names groups {int(found.min())} to {int(found.max())}, there are {scales.grid[1]}")


def _stored_shape(info: TensorInfo) -> tuple[int, int]:
    """Return the two numbers that a tensor holds: a shape, which is needed before weights are read.

    Raises:
        CheckpointError: They are not a shape.
    """
    if info.dtype.name not in ("int64", "int32") or info.shape != (2,):
        raise flaw(info, "must be two int64, the shape of the weight")
    with Reader() as reader:
        rows, columns = read_whole(reader, info).tolist()
    if not all(0 < number < 1 << 31 for number in (rows, columns)):
        raise flaw(info, f"holds {[rows, columns]}, which is not a shape")
    return rows, columns


def _bits(pool: Pool, packed: TensorInfo, shape: tuple[int, int]) -> tuple[int, bool]:
    """Return the bits per number, and whether each lies within one word: the group of the settings that fits.

    Raises:
        CheckpointError: The settings give no number of bits, or none that fits the shapes.
    """
    groups = pool.settings.get("config_groups")
    found = [
        group["weights"].get("num_bits")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    allowed = [*dict.fromkeys(bits for bits in found if type(bits) is int and 2 <= bits <= 8)]
    if not allowed:
        raise CheckpointError(
            f"{pool.where}: config.json: num_bits of packed weights must be a number from 2 to 8, found {brief(found)}; "
            f"tensor {packed.name!r} needs it"
        )
    for bits in allowed:
        if packed.shape == (shape[0], words_for(shape[1], bits)):
            return bits, False
        if packed.shape == (shape[0], -(-shape[1] // (32 // bits))):
            return bits, True
    raise flaw(
        packed,
        f"shape {list(packed.shape)} does not hold numbers of {' or '.join(map(str, allowed))} bits of a weight of "
        f"shape {list(shape)}",
    )
