"""Weights quantised by HQQ: `W_q`, `scale`, `zero` and numbers that tell the layout, per layer: `W = (q - zero) * scale`.

The weight is laid out as [groups, group size] (`axis` 1) or [group size, groups] (`axis` 0). Its rows are cut into as many
equal parts as numbers fit into a word, and the parts lie over each other, the first in the highest bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....errors import UnsupportedError
from ....wording import brief
from ...derived.derived import read_rows, read_whole
from ...reader import Reader
from ...tensor import ByteReader, TensorInfo
from .noise import StepNoise
from .pool import Pool, flaw

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_hqq"]

_PACKINGS = {"8bit_u8": (1, 8), "4bit_u8": (2, 4), "3bit_32": (10, 3), "2bit_u8": (4, 2), "1bit_u8": (8, 1)}
"""Numbers per word, and bits of each."""

_TOLD = frozenset(
    ["nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero",
     "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"]
)  # fmt: skip
_LONGEST_TEXT = 32


@dataclass(frozen=True, slots=True)
class _Grouped:
    weight: TensorInfo
    scale: TensorInfo
    zero: TensorInfo
    grid: tuple[int, int]
    width: int
    axis: int
    packing: tuple[int, int]

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        columns = self.grid[1]
        start, stop = first * self.width, end * self.width
        low, high = start // columns, -(-stop // columns)
        numbers = self._numbers(reader, low, high)
        scale, zero = (self._per_group(reader, each, low, high) for each in (self.scale, self.zero))
        values = ((numbers - zero) * scale).flatten()
        return values[start - low * columns : stop - low * columns].view(end - first, self.width)

    def _numbers(self, reader: ByteReader, low: int, high: int) -> Tensor:
        import torch

        count, bits = self.packing
        step = self.weight.shape[0]
        found = []
        for part in range(count):
            first, last = max(low, part * step), min(high, (part + 1) * step)
            if first < last:
                words = read_rows(reader, self.weight, first - part * step, last - part * step)
                found.append((words >> (count - 1 - part) * bits & (1 << bits) - 1).float())
        return torch.cat(found)

    def _per_group(self, reader: ByteReader, tensor: TensorInfo, low: int, high: int) -> Tensor:
        if self.axis == 0:
            return read_whole(reader, tensor).float().view(1, -1)
        return read_rows(reader, tensor, low, high).float()


def read_hqq(pool: Pool) -> None:
    """Take every weight that HQQ quantised.

    Raises:
        CheckpointError: A part is missing, or does not fit.
        UnsupportedError: A way of packing that is not known.
    """
    for name in pool.ending(".W_q"):
        _read(pool, pool.stored[name], name.removesuffix(".W_q"))


def _read(pool: Pool, weight: TensorInfo, stem: str) -> None:
    packing = _text(pool, weight, f"{stem}.packing")
    if packing not in _PACKINGS:
        raise UnsupportedError(
            f"{pool.where}: {stem}: numbers packed as {packing!r} cannot be read; {', '.join(_PACKINGS)} can"
        )
    count, bits = _PACKINGS[packing]
    shape = _numbers(pool, weight, f"{stem}.shape")
    axis = _numbers(pool, weight, f"{stem}.axis")
    if len(shape) != 2 or not all(0 < n < 1 << 31 for n in shape) or axis not in ([0], [1]):
        raise flaw(weight, f"shape {brief(shape)} and axis {brief(axis)} of its layer must be two numbers, and 0 or 1")
    wanted = "int32" if packing == "3bit_32" else "uint8"
    if weight.dtype.name != wanted or len(weight.shape) != 2:
        raise flaw(weight, f"must be a matrix of {wanted}, found {weight.dtype.name} {list(weight.shape)}")
    scale = pool.need(weight, "its scales", f"{stem}.scale")
    zero = pool.need(weight, "its zero points", f"{stem}.zero")
    size, groups = shape[0] * shape[1], scale.numel
    if any(part.dtype.kind != "float" or part.numel != groups for part in (scale, zero)):
        raise flaw(scale, "scales and zero points must be floats, one of each per group; quantised ones cannot be read")
    if not groups or size % groups:
        raise flaw(scale, f"{groups} groups do not divide the {size} values of {stem}")
    lengths = (groups, size // groups)
    grid = lengths if axis[0] == 1 else lengths[::-1]
    expected = (groups, 1) if axis[0] == 1 else (1, groups)
    if weight.shape != (-(-grid[0] // count), grid[1]) or {scale.shape, zero.shape} != {expected}:
        raise flaw(
            weight,
            f"shape {list(weight.shape)}, scales {list(scale.shape)} and zero points {list(zero.shape)} are not those of "
            f"{list(shape)} in {groups} groups",
        )
    pool.make(
        f"{stem}.weight",
        (shape[0], shape[1]),
        [weight, scale, zero],
        _Grouped(weight=weight, scale=scale, zero=zero, grid=grid, width=shape[1], axis=axis[0], packing=(count, bits)),
        scheme=f"hqq {bits}-bit in groups of {size // groups}",
        noise=StepNoise(size // groups, (1 << bits) - 1, symmetric=False),
    )
    for each in _TOLD:
        pool.drop(f"{stem}.{each}", "it tells how HQQ packed the layer")


def _numbers(pool: Pool, weight: TensorInfo, name: str) -> list[int]:
    """Return the few whole numbers of a tensor, which are needed before weights are read.

    Raises:
        CheckpointError: They are missing, or are none.
    """
    info = pool.need(weight, "a number of its layout", name)
    if info.dtype.kind != "int" or info.numel > _LONGEST_TEXT:
        raise flaw(info, f"must be a few whole numbers, found {info.dtype.name} {list(info.shape)}")
    with Reader() as reader:
        found = read_whole(reader, info).flatten().tolist()
    return [int(number) for number in found]


def _text(pool: Pool, weight: TensorInfo, name: str) -> str:
    return "".join(chr(number) for number in _numbers(pool, weight, name) if 31 < number < 127)
