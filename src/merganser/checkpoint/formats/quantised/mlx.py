"""Weights quantised by MLX: `weight` uint32, packed along the input, and per group `scales` and `biases`: `W = q * s + b`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....errors import UnsupportedError
from ...derived.derived import read_rows
from ...tensor import ByteReader, TensorInfo
from .bits import unpack
from .noise import StepNoise
from .pool import Pool, flaw

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_mlx"]

_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True)
class _Affine:
    weight: TensorInfo
    scales: TensorInfo
    biases: TensorInfo
    size: int
    bits: int

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        groups = self.scales.shape[-1]
        words = read_rows(reader, self.weight, first, end)
        numbers = unpack(words, self.bits, groups * self.size).view(end - first, groups, self.size)
        scales, biases = (
            read_rows(reader, each, first, end).float()[:, :, None] for each in (self.scales, self.biases)
        )
        return (numbers * scales + biases).flatten(1)


def read_mlx(pool: Pool) -> None:
    """Take every weight that MLX quantised.

    Raises:
        CheckpointError: A part is missing, or does not fit.
        UnsupportedError: A mode other than affine.
    """
    for name in pool.ending(".weight"):
        weight, stem = pool.stored[name], name.removesuffix(".weight")
        if weight.dtype.name != "uint32":
            continue
        scales = pool.need(weight, "its scales", f"{stem}.scales")
        own = pool.settings.get(stem)
        mode = (own if isinstance(own, dict) else pool.settings).get("mode", "affine")
        if mode != "affine":
            raise UnsupportedError(f"{pool.where}: {name}: the mode {mode!r} of MLX cannot be read, only 'affine'")
        biases = pool.need(weight, "its biases", f"{stem}.biases")
        _read(pool, weight, scales, biases, own if isinstance(own, dict) else {})


def _read(pool: Pool, weight: TensorInfo, scales: TensorInfo, biases: TensorInfo, own: dict[str, object]) -> None:
    size = own.get("group_size", pool.settings.get("group_size", 64))
    if type(size) is not int or not 0 < size < 1 << 20:
        raise flaw(weight, f"group_size of config.json must be a whole number above 0, found {size!r}")
    lead = weight.shape[:-1]
    if len(weight.shape) < 2 or scales.shape[:-1] != lead or len(scales.shape) != len(weight.shape) or not scales.numel:
        raise flaw(scales, f"shape {list(scales.shape)} does not fit the weight {list(weight.shape)}")
    if biases.shape != scales.shape or biases.dtype.kind != "float" or scales.dtype.kind != "float":
        raise flaw(biases, f"scales and biases must be floats of one shape, found {list(biases.shape)}")
    columns = scales.shape[-1] * size
    bits = weight.shape[-1] * 32 // columns
    if bits not in _BITS or bits * columns != weight.shape[-1] * 32:
        raise flaw(
            weight,
            f"{weight.shape[-1]} words hold no whole number of bits (of {', '.join(map(str, _BITS))}) for {columns} columns",
        )
    pool.make(
        weight.name,
        (*lead, columns),
        [weight, scales, biases],
        _Affine(weight, scales, biases, size, bits),
        scheme=f"mlx {bits}-bit in groups of {size}",
        noise=StepNoise(size, (1 << bits) - 1, symmetric=False),
    )
