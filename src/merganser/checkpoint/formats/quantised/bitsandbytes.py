"""4-bit weights of bitsandbytes (NF4, FP4): a table, a scale per 64 values in order, and scales that may be quantised, too.

`weight` holds two numbers per byte, the high half first. `weight.quant_state.*` is JSON as bytes. A nested scale is
`nested_quant_map[absmax] * nested_absmax[block // 256] + nested_offset`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....jsonfile import parse_object
from ....wording import brief
from ...derived.derived import read_elements, read_whole
from ...reader import Reader
from ...tensor import ByteReader, TensorInfo
from .bits import nibbles
from .noise import CodeNoise
from .pool import Pool, flaw

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_bitsandbytes"]

_STATE = ".quant_state.bitsandbytes__"
_MOST = 1 << 16
_NF4 = tuple(
    map(
        float,
        [
            "-1",
            "-.6961928",
            "-.52507305",
            "-.3949175",
            "-.28444138",
            "-.18477343",
            "-.09105004",
            "0",
            ".0795803",
            ".1609302",
            ".2461123",
            ".33791524",
            ".44070983",
            ".562617",
            ".72295684",
            "1",
        ],
    )
)
_FP4 = (-12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -0.0625, 0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


@dataclass(frozen=True, slots=True)
class _Nested:
    """Scales of scales; `block` of them share one."""

    absmax: TensorInfo
    code: TensorInfo
    offset: float
    block: int


@dataclass(frozen=True, slots=True)
class _Blocks:
    weight: TensorInfo
    absmax: TensorInfo
    code: TensorInfo
    nested: _Nested | None
    block: int
    width: int

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        import torch

        start, stop = first * self.width, end * self.width
        packed = read_elements(reader, self.weight, start // 2, -(-stop // 2))
        numbers = nibbles(packed, high_first=True)[start % 2 :][: stop - start]
        values = read_whole(reader, self.code)[numbers]
        low = start // self.block
        scales = self._scales(reader, low, -(-stop // self.block))
        return (values * scales[torch.arange(start, stop) // self.block - low]).view(end - first, self.width)

    def _scales(self, reader: ByteReader, low: int, high: int) -> Tensor:
        import torch

        found = read_elements(reader, self.absmax, low, high)
        if self.nested is None:
            return found
        own = self.nested
        first = low // own.block
        scales = read_elements(reader, own.absmax, first, -(-high // own.block))
        values = read_whole(reader, own.code)[found.int()]
        return values * scales[torch.arange(low, high) // own.block - first] + own.offset


def read_bitsandbytes(pool: Pool) -> None:
    """Take every 4-bit weight of bitsandbytes.

    Raises:
        CheckpointError: A part is missing, or does not fit.
    """
    for name in [name for name in pool.stored if _STATE in name and pool.free(name)]:
        _read(pool, name.partition(_STATE)[0], pool.stored[name])


def _read(pool: Pool, name: str, state_info: TensorInfo) -> None:
    kind = state_info.name.partition(_STATE)[2]
    if kind not in ("nf4", "fp4"):
        raise flaw(state_info, f"the type must be nf4 or fp4, found {kind!r}")
    weight = pool.need(state_info, "the weight", name)
    absmax = pool.need(weight, "its scales", f"{name}.absmax")
    code = pool.need(weight, "the table of its values", f"{name}.quant_map")
    state = _state(state_info)
    shape = tuple(_whole(state_info, state, "shape", 1 << 31))
    (block,) = _whole(state_info, state, "blocksize", 1 << 20, single=True)
    if len(shape) < 2:
        raise flaw(state_info, f"shape must have two dimensions or more, found {list(shape)}")
    count = math.prod(shape)
    _check(weight, "uint8", -(-count // 2))
    _check(code, "float32", 16)
    parts = [weight, absmax, code, state_info]
    nested = None
    if pool.find(f"{name}.nested_absmax") is not None or absmax.dtype.name == "uint8":
        nested = _nested(pool, name, absmax, state_info, state)
        parts += [nested.absmax, nested.code]
    _check(absmax, "float32" if nested is None else "uint8", -(-count // block))
    pool.make(
        name,
        shape,
        parts,
        _Blocks(weight, absmax, code, nested, block, shape[-1]),
        scheme=f"bitsandbytes {kind} in blocks of {block}",
        noise=CodeNoise(block, _NF4 if kind == "nf4" else _FP4),
    )


def _nested(pool: Pool, name: str, absmax: TensorInfo, state_info: TensorInfo, state: dict[str, Any]) -> _Nested:
    own = pool.need(absmax, "the scale of these scales", f"{name}.nested_absmax")
    code = pool.need(absmax, "the table of these scales", f"{name}.nested_quant_map")
    (block,) = _whole(state_info, state, "nested_blocksize", 1 << 20, single=True)
    _check(own, "float32", -(-absmax.numel // block))
    _check(code, "float32", 256)
    offset = state.get("nested_offset")
    if not isinstance(offset, (int, float)) or isinstance(offset, bool) or not math.isfinite(offset):
        raise flaw(state_info, f"nested_offset must be a number, found {brief(offset)}")
    return _Nested(own, code, float(offset), block)


def _check(tensor: TensorInfo, dtype: str, count: int) -> None:
    if tensor.dtype.name != dtype or tensor.numel != count:
        raise flaw(tensor, f"must be {dtype} with {count} elements, found {tensor.dtype.name} with {tensor.numel}")


def _state(info: TensorInfo) -> dict[str, Any]:
    """Parse the JSON that a tensor of bytes holds.

    Raises:
        CheckpointError: It is none.
    """
    if info.dtype.name != "uint8" or info.numel > _MOST:
        raise flaw(info, f"must be JSON as bytes, found {info.numel} elements of {info.dtype.name}")
    with Reader() as reader:
        text = read_whole(reader, info).numpy().tobytes()
    try:
        return parse_object(text, f"{info.file}: tensor {info.name!r}")
    except UnicodeDecodeError:
        raise flaw(info, "must be JSON as bytes") from None


def _whole(info: TensorInfo, state: dict[str, Any], key: str, limit: int, *, single: bool = False) -> list[int]:
    """Return the whole numbers above 0 under a key.

    Raises:
        CheckpointError: There are others.
    """
    value = state.get(key)
    numbers = [value] if single else value
    if not isinstance(numbers, list) or not all(type(each) is int and 0 < each < limit for each in numbers):
        raise flaw(
            info, f"{key} must be {'a whole number' if single else 'whole numbers'} above 0, found {brief(value)}"
        )
    return numbers
