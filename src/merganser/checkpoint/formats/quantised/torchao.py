"""Weights quantised by torchao, in safetensors: `_weight_qdata`, `_weight_scale`, `_weight_zero_point`.

`W = (q - zero) * scale`, with float8 or int8 numbers that are not packed, and a scale per tensor, row, group or tile.
Int4Tensor packs two numbers into a byte, the lower half first: `W = q * scale + zero`, with scales [groups, rows] (the
definition is `int4_row_quantize_zp` of FBGEMM, which torchao calls). The header of the file says for every weight which
class it is of; other packed classes are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ....errors import UnsupportedError
from ....jsonfile import parse_object
from ....wording import brief
from ...derived.derived import read_columns, read_rows
from ...tensor import ByteReader, Noise, TensorInfo
from .bits import nibbles
from .noise import FloatNoise, StepNoise
from .pool import Pool, flaw
from .scales import Scaled, scales_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_torchao"]

_NAME = re.compile(r"(.+)\._(.+)_qdata")
_DTYPES = {
    "Float8Tensor": ("float8_e4m3fn", "float8_e5m2"),
    "Int8Tensor": ("int8",),
    "IntxUnpackedToInt8Tensor": ("int8",),
}
_REFUSED = {
    "Int4TilePackedTo4dTensor": "its numbers lie in the order of a GPU's matrix unit, which is another one on AMD than on NVIDIA, and "
    "the file does not say which; load it in torchao on such a GPU and save it unquantised",
    "Int4PlainInt32Tensor": "its numbers lie in an order of Intel's or Huawei's processors, and the file does not say which; load it "
    "in torchao on such a processor and save it unquantised",
}
"""Why classes cannot be read that torchao writes into safetensors."""

_BITS = re.compile(r"u?int([1-8])")


@dataclass(frozen=True, slots=True)
class _Int4:
    """Two signed numbers per byte; scale and zero of each group lie transposed, [matrices * groups, rows]."""

    weight: TensorInfo
    scale: TensorInfo
    zero: TensorInfo
    rows: int
    groups: int

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        import torch

        found = []
        while first < end:
            matrix, low = divmod(first, self.rows)
            high = min(end - matrix * self.rows, self.rows)
            numbers = nibbles(read_rows(reader, self.weight, first, matrix * self.rows + high).view(torch.uint8)).to(
                torch.int8
            )
            # the upper half of the sixteen numbers are the negative ones
            values = ((numbers ^ 8) - 8).float().view(high - low, self.groups, -1)
            lines = range(matrix * self.groups, (matrix + 1) * self.groups)
            scale, zero = (
                read_columns(reader, each, lines, range(low, high)).T.float()[:, :, None]
                for each in (self.scale, self.zero)
            )
            found.append((values * scale + zero).flatten(1))
            first = matrix * self.rows + high
        return found[0] if len(found) == 1 else torch.cat(found)


def read_torchao(pool: Pool) -> None:
    """Take every weight that torchao quantised.

    Raises:
        CheckpointError: A part is missing, or does not fit.
        UnsupportedError: A class whose numbers are packed.
    """
    for name in pool.ending("_qdata"):
        match = _NAME.fullmatch(name)
        if match is not None:
            _read(pool, pool.stored[name], f"{match[1]}.{match[2]}", f"{match[1]}._{match[2]}_")


def _read(pool: Pool, weight: TensorInfo, name: str, prefix: str) -> None:
    kind, about = _about(pool, weight, name)
    if kind not in (*_DTYPES, "Int4Tensor"):
        why = _REFUSED.get(
            kind, f"its numbers are packed in a way that is not known; {', '.join(_DTYPES)} and Int4Tensor can"
        )
        raise UnsupportedError(f"{pool.where}: {name}: torchao's {kind} cannot be read: {why}")
    known = {f"{prefix}{part}" for part in ("qdata", "scale", "zero_point")}
    other = next((each for each in pool.stored if each.startswith(prefix) and each not in known), None)
    if other is not None:
        raise UnsupportedError(f"{pool.where}: {other}: this part of torchao's {kind} is not known")
    if kind == "Int4Tensor":
        _read_int4(pool, weight, name, prefix, about)
        return
    if weight.dtype.name not in _DTYPES[kind] or len(weight.shape) < 2:
        raise flaw(
            weight, f"must be a matrix of {' or '.join(_DTYPES[kind])}, found {weight.dtype.name} {list(weight.shape)}"
        )
    scale = pool.need(weight, "its scales", f"{prefix}scale")
    scales = scales_of(weight, weight.shape, scale, _block(weight, about))
    zeros = pool.find(f"{prefix}zero_point")
    if zeros is not None and (zeros.shape != scale.shape or zeros.dtype.name not in ("int8", "int32", "int64")):
        raise flaw(zeros, f"must be whole numbers of the shape of the scales, {list(scale.shape)}")
    target = about.get("target_dtype")
    bits = _BITS.fullmatch(str(target.get("_data"))) if isinstance(target, dict) else None
    noise: Noise = FloatNoise(3 if weight.dtype.name.endswith("e4m3fn") else 2)
    if weight.dtype.name == "int8":
        noise = StepNoise(scales.block[1], (1 << (int(bits[1]) if bits else 8)) - 1, symmetric=False)
    lie = None if zeros is None else replace(scales, tensor=zeros)
    pool.make(
        name,
        weight.shape,
        [weight, scale, zeros],
        Scaled(weight, scales, lie),
        scheme=f"torchao {kind} per {scales.block[0]}x{scales.block[1]}",
        noise=noise,
    )


def _read_int4(pool: Pool, weight: TensorInfo, name: str, prefix: str, about: Mapping[str, Any]) -> None:
    if weight.dtype.name not in ("int8", "uint8") or len(weight.shape) not in (2, 3) or not weight.numel:
        raise flaw(
            weight, f"must be a matrix of bytes, or a stack of them, found {weight.dtype.name} {list(weight.shape)}"
        )
    scale, zero = (
        pool.need(weight, "its scales", f"{prefix}scale"),
        pool.need(weight, "its zeros", f"{prefix}zero_point"),
    )
    shape = (*weight.shape[:-1], 2 * weight.shape[-1])
    block = about.get("block_size")
    lead, size = (block[:-1], block[-1]) if isinstance(block, list) and block else ([], None)
    if type(size) is not int or size < 1 or shape[-1] % size or lead != [1] * len(shape[:-1]):
        raise flaw(
            weight, f"block_size of its metadata must be 1 and a divisor of {shape[-1]} columns, found {brief(block)}"
        )
    groups, rows = shape[-1] // size, shape[-2]
    for each in (scale, zero):
        if each.dtype.kind != "float" or each.shape != (*shape[:-2], groups, rows):
            raise flaw(
                each,
                f"must be floats of shape {[*shape[:-2], groups, rows]}, found {each.dtype.name} {list(each.shape)}",
            )
    pool.make(
        name,
        shape,
        [weight, scale, zero],
        _Int4(weight, scale, zero, rows, groups),
        scheme=f"torchao Int4Tensor in groups of {size}",
        noise=StepNoise(size, 15, symmetric=False),
    )


def _about(pool: Pool, weight: TensorInfo, name: str) -> tuple[str, Mapping[str, Any]]:
    """Return the class of a weight and its settings, from the header of the file.

    Raises:
        CheckpointError: The header does not give them.
    """
    text = pool.metadata.get(name)
    if text is None:
        raise flaw(weight, f"the header of the file says nothing of {name}, so its class in torchao is not known")
    entry = parse_object(text.encode(), f"{weight.file}: metadata of {name}")
    kind, about = entry.get("_type"), entry.get("_data")
    if not isinstance(kind, str) or not isinstance(about, dict):
        raise flaw(weight, f"the metadata of {name} must give _type and _data, found {brief(entry)}")
    return kind, about


def _block(weight: TensorInfo, about: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns that share a scale.

    Raises:
        CheckpointError: The metadata give none.
    """
    block = about.get("block_size")
    dims = len(weight.shape)
    if (
        not isinstance(block, list)
        or len(block) != dims
        or not all(type(n) is int and n > 0 for n in block)
        or any(n != 1 for n in block[:-2])
    ):
        raise flaw(
            weight, f"block_size of its metadata must be positive numbers, one per dimension, found {brief(block)}"
        )
    return min(block[-2], weight.shape[-2]), min(block[-1], weight.shape[-1])
