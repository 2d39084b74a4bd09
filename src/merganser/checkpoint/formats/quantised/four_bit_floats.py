"""4-bit floats (E2M1) with a scale per group: MXFP4 (32 values, a power of two) and NVFP4 (16 values, float8).

As gpt-oss stores experts (`X_blocks`, `X_scales`: the weight is the transpose of each matrix), as compressed-tensors
(`weight_packed`, `weight_scale`, `weight_global_scale`, by which NVFP4 divides), and as ModelOpt (`weight`,
`weight_scale`, `weight_scale_2`, by which it multiplies). The low half of a byte comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...derived.derived import read_columns, read_rows, read_whole
from ...tensor import ByteReader, TensorInfo
from .bits import E2M1, nibbles, table
from .noise import CodeNoise
from .pool import Pool, flaw
from .scales import to_float

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_four_bit_floats"]

_CODE = tuple(sorted(set(E2M1)))


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Rows of packed values; the scale of each group is multiplied or divided by one of the tensor."""

    weight: TensorInfo
    scale: TensorInfo
    overall: TensorInfo | None
    how: Literal["times", "by"]

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        values = table(E2M1)[nibbles(read_rows(reader, self.weight, first, end))]
        scales = to_float(read_rows(reader, self.scale, first, end))
        if self.overall is not None:
            overall = read_whole(reader, self.overall).float().reshape(-1)
            if overall.numel() > 1:  # one per matrix of a stack
                import torch

                overall = overall[torch.arange(first, end) // self.weight.shape[-2]][:, None]
            scales = scales * overall if self.how == "times" else scales / overall
        return (values.view(end - first, scales.shape[1], -1) * scales[:, :, None]).flatten(1)


@dataclass(frozen=True, slots=True)
class _Transposed:
    """Experts of gpt-oss: [experts, columns, groups, 16] bytes give [experts, groups * 32, columns] values."""

    blocks: TensorInfo
    scale: TensorInfo

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        import torch

        _, width, groups, _ = self.blocks.shape
        height = groups * 32
        parts = []
        while first < end:
            expert = first // height
            upto = min(end, (expert + 1) * height)
            parts.append(
                self._expert(reader, range(expert * width, (expert + 1) * width), first % height, upto - first)
            )
            first = upto
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _expert(self, reader: ByteReader, lines: range, first: int, count: int) -> Tensor:
        low, high = first // 32, -(-(first + count) // 32)
        packed = read_columns(reader, _flat(self.blocks), lines, range(low * 16, high * 16))
        scales = read_columns(reader, self.scale, lines, range(low, high))
        values = table(E2M1)[nibbles(packed)].view(len(lines), high - low, 32)
        values = _times_powers(values, scales).flatten(1)
        return values[:, first - low * 32 :][:, :count].T


def _times_powers(values: Tensor, scales: Tensor) -> Tensor:
    """Multiply groups by two to the power of bytes with a bias of 127, as transformers does."""
    import torch

    return torch.ldexp(values, (scales.int() - 127)[:, :, None])


def _flat(blocks: TensorInfo) -> TensorInfo:
    from dataclasses import replace

    experts, width, groups, size = blocks.shape
    return replace(blocks, shape=(experts, width, groups * size))


def read_four_bit_floats(pool: Pool) -> None:
    """Take every weight of 4-bit floats.

    Raises:
        CheckpointError: Scales are missing or do not fit.
    """
    for name in pool.ending("_blocks"):
        if pool.stored[name].dtype.name == "uint8":
            _read_experts(pool, pool.stored[name])
    for name in pool.ending(".weight_packed"):
        if pool.stored[name].dtype.name == "uint8":
            stem = name.removesuffix("_packed")
            _read_grouped(pool, stem, pool.stored[name], pool.find(f"{stem}_global_scale"), "by")
    for name in pool.ending(".weight"):
        overall = pool.find(f"{name}_scale_2")
        if pool.stored[name].dtype.name == "uint8" and overall is not None:
            _read_grouped(pool, name, pool.stored[name], overall, "times")


def _read_experts(pool: Pool, blocks: TensorInfo) -> None:
    stem = blocks.name.removesuffix("_blocks")
    scale = pool.need(blocks, "its scales", f"{stem}_scales")
    if len(blocks.shape) != 4 or blocks.shape[3] != 16:
        raise flaw(blocks, f"must have the shape [experts, columns, groups, 16], found {list(blocks.shape)}")
    experts, width, groups, _ = blocks.shape
    if scale.dtype.name not in ("uint8", "float8_e8m0fnu") or scale.shape != (experts, width, groups):
        raise flaw(scale, f"must be bytes of shape {[experts, width, groups]}, found {list(scale.shape)}")
    rows = _Transposed(blocks, scale)
    pool.make(stem, (experts, groups * 32, width), [blocks, scale], rows, scheme="mxfp4", noise=CodeNoise(32, _CODE))


def _read_grouped(
    pool: Pool, name: str, packed: TensorInfo, overall: TensorInfo | None, how: Literal["times", "by"]
) -> None:
    scale = pool.need(packed, "its scales", f"{name}_scale")
    shape = (*packed.shape[:-1], 2 * packed.shape[-1]) if packed.shape else ()
    size = 32 if overall is None else 16
    if len(shape) < 2 or shape[-1] % size or scale.shape != (*shape[:-1], shape[-1] // size):
        raise flaw(
            scale,
            f"shape {list(scale.shape)} does not give one scale per {size} columns of packed {list(packed.shape)}",
        )
    allowed = ("uint8", "float8_e8m0fnu") if overall is None else ("float8_e4m3fn",)
    if scale.dtype.name not in allowed:
        raise flaw(scale, f"must be {' or '.join(allowed)}, found {scale.dtype.name}")
    if overall is not None and (overall.dtype.kind != "float" or overall.numel not in (1, *shape[:-2])):
        raise flaw(overall, f"must be one float, found {overall.dtype.name} {list(overall.shape)}")
    scheme = "mxfp4" if overall is None else "nvfp4"
    pool.make(
        name,
        shape,
        [packed, scale, overall],
        _Grouped(packed, scale, overall, how),
        scheme=scheme,
        noise=CodeNoise(size, _CODE),
    )
