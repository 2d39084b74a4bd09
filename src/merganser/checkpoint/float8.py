"""Weights stored as float8 with scales: how they are rounded, and what config.json says of them.

A scale belongs to a tile of a matrix and is its largest magnitude divided by 448, the largest float8_e4m3fn. Rounding is
to the nearest value of the grid, ties to even. Sources: DeepSeek-V3 (arXiv:2412.19437, section 3.3) for tiles of 128 x 128,
the compressed-tensors library for a scale per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .dtypes import DTYPE_BY_NAME, DType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FLOAT8", "FLOAT8_SCHEMES", "Float8", "decode_float8", "encode_float8", "float8_settings"]

FLOAT8 = DTYPE_BY_NAME["float8_e4m3fn"]
_MAX = 448.0
_SMALLEST = 2.0**-126


@dataclass(frozen=True, slots=True)
class Float8:
    """A way of dividing a matrix into tiles that share a scale.

    Args:
        name: As recipes name it.
        tile: Rows and columns of a tile; the last ones may be smaller. 0 columns: the whole row.
        suffix: What follows the name of a weight in the name of its scales.
        scale: Dtype of the scales.
        layout: What `quant_method` of config.json calls it.
    """

    name: str
    tile: tuple[int, int]
    suffix: str
    scale: DType
    layout: str

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the shape of the scales of a matrix."""
        rows, columns = shape
        height, width = self.tile
        return -(-rows // height), -(-columns // (width or columns))


FLOAT8_SCHEMES = {
    "fp8_block": Float8("fp8_block", (128, 128), "_scale_inv", DTYPE_BY_NAME["float32"], "fp8"),
    # programs give these scales the dtype of the model, so they are bfloat16 numbers from the start
    "fp8_channel": Float8("fp8_channel", (1, 0), "_scale", DTYPE_BY_NAME["bfloat16"], "compressed-tensors"),
}
"""By their names in recipes."""


def encode_float8(values: Tensor, scheme: Float8) -> tuple[Tensor, Tensor]:
    """Round consecutive rows of a matrix, of which the first begins a tile.

    The quotient of value and scale is rounded to float32, then to float8; that is at most half a step of the float8 grid
    and 2^-24 of the quotient away from the value.

    Args:
        values: Finite, shape [rows, columns].
        scheme: The tiles.

    Returns:
        float8_e4m3fn of the same shape, and the scales of its tiles, in their dtype. Tiles of zeros have the scale 1.
    """
    import torch
    from torch.nn.functional import pad

    values = values.float()
    rows, columns = values.shape
    height, width = scheme.tile[0], scheme.tile[1] or columns
    down, across = scheme.scale_shape((rows, columns))
    if width == columns and height == 1:
        tiles = values.view(rows, 1, 1, columns)
    else:
        padded = pad(values, (0, across * width - columns, 0, down * height - rows))
        tiles = padded.view(down, height, across, width)
    largest = tiles.abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, (largest / _MAX).clamp_min(_SMALLEST), 1.0)
    if scheme.scale.name == "bfloat16":
        # upwards, so that the largest value stays inside the grid
        scales = ((scales.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    codes = codes.view(down * height, across * width)[:rows, :columns]
    return codes.contiguous(), scales.to(getattr(torch, scheme.scale.name))


def decode_float8(codes: Tensor, scales: Tensor, scheme: Float8) -> Tensor:
    """Return the float32 values of a matrix that `encode_float8` rounded."""
    rows, columns = codes.shape
    height, width = scheme.tile[0], scheme.tile[1] or columns
    spread = scales.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return codes.float() * spread


def float8_settings(scheme: Float8, kept: Sequence[str]) -> dict[str, Any]:
    """Return `quantization_config` of config.json.

    Args:
        scheme: How weights are stored.
        kept: Names of the linear layers that are not float8.
    """
    if scheme.layout == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(scheme.tile),
            "modules_to_not_convert": list(kept),
        }
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": list(kept),
        "kv_cache_scheme": None,
    }
