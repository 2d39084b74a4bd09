"""Float8 weights with scales: per tensor, per row, per group, or per tile (DeepSeek, Qwen, Llama, compressed-tensors).

`W = w * scale`: scales are multiplied, though DeepSeek calls them `weight_scale_inv`. Tiles at the edges are cut off.
"""

from __future__ import annotations

from ....errors import CheckpointError
from ....wording import brief
from .noise import FloatNoise
from .pool import Pool, flaw
from .scales import Scaled, scales_of

__all__ = ["read_fp8"]

_MANTISSA = {"float8_e4m3fn": 3, "float8_e4m3fnuz": 3, "float8_e5m2": 2, "float8_e5m2fnuz": 2}


def read_fp8(pool: Pool) -> None:
    """Take every float8 weight with its scales.

    Raises:
        CheckpointError: Scales are missing or do not fit.
    """
    block = _block(pool)
    for name, weight in pool.stored.items():
        if weight.dtype.name not in _MANTISSA or not pool.free(name) or _is_scale(pool, name):
            continue
        scale = pool.find(f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('.weight')}.scale")
        if scale is None:
            raise flaw(
                weight, f"the scales of {weight.dtype.name} values ({name}_scale or {name}_scale_inv) are missing"
            )
        if scale.name == name:
            continue
        scales = scales_of(weight, weight.shape, scale, block)
        tile = "x".join(map(str, scales.block)) if scales.grid != (1, 1) else "tensor"
        pool.make(
            name,
            weight.shape,
            [weight, scale],
            Scaled(weight, scales),
            scheme=f"{weight.dtype.name} per {'row' if scales.grid == (scales.rows, 1) else tile}",
            noise=FloatNoise(_MANTISSA[weight.dtype.name]),
        )


def _is_scale(pool: Pool, name: str) -> bool:
    """Return whether a float8 tensor is itself the scales of another tensor."""
    return any(
        name.endswith(ending) and name.removesuffix(ending) + rest in pool.stored
        for ending in ("_scale_inv", "_scale", ".scales", ".scale")
        for rest in ("", ".weight", "_packed", ".weight_packed")
        if name != name.removesuffix(ending) + rest
    )


def _block(pool: Pool) -> tuple[int, int] | None:
    """Return the tile of the settings; None if they give none.

    Raises:
        CheckpointError: It is not two positive numbers.
    """
    value = pool.settings.get("weight_block_size")
    if value is None:
        return None
    numbers = isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in value)
    if not numbers:
        raise CheckpointError(
            f"{pool.where}: config.json: weight_block_size must be two whole numbers above 0, found {brief(value)}"
        )
    return value[0], value[1]
