"""Rounding to float8 with scales: equal to a loop over tiles, and to what the libraries make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from merganser.checkpoint.float8 import FLOAT8_SCHEMES, decode_float8, encode_float8

SHAPES = [(128, 256), (130, 300), (5, 7), (576, 129), (1, 1)]


def by_hand(values: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, tile by tile."""
    rows, columns = values.shape
    height, width = (128, 128) if name == "fp8_block" else (1, columns)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // height), -(-columns // width))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scale = values[place].abs().max() / 448
            if name == "fp8_channel":
                near = scale.bfloat16()
                while near.float() < scale:
                    near = torch.nextafter(near, torch.tensor(torch.inf, dtype=torch.bfloat16))
                scale = near.float()
            scale = torch.tensor(1.0) if scale == 0 else scale
            codes[place] = (values[place] / scale).to(torch.float8_e4m3fn)
            scales[i, j] = scale
    return codes, scales


@pytest.mark.parametrize("name", FLOAT8_SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_rounded_as_by_hand(name: str, shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    values[0] = 0
    scheme = FLOAT8_SCHEMES[name]
    codes, scales = encode_float8(values, scheme)
    expected_codes, expected_scales = by_hand(values, name)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    assert torch.equal(scales.float(), expected_scales)
    assert tuple(scales.shape) == scheme.scale_shape(shape)
    # half a step of the grid: 2^-4 of a value, or of the smallest normal one (2^-6) of its tile
    restored = decode_float8(codes, scales, scheme)
    spread = decode_float8(torch.ones_like(values).to(torch.float8_e4m3fn), scales, scheme)
    assert bool(((restored - values).abs() <= 1.0001 * 2**-4 * torch.maximum(values.abs(), spread * 2**-6)).all())


@pytest.mark.parametrize("name", FLOAT8_SCHEMES)
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 3e38])
def test_extreme_sizes_stay_finite(name: str, size: float) -> None:
    values = torch.tensor([[size, -size / 2, 0.0]])
    codes, scales = encode_float8(values, FLOAT8_SCHEMES[name])
    restored = decode_float8(codes, scales, FLOAT8_SCHEMES[name])
    assert bool(torch.isfinite(restored).all())
    assert bool(((restored - values).abs() <= 0.07 * abs(size) + 2**-126).all())


@pytest.mark.parametrize("shape", [(128, 256), (384, 128)])
def test_transformers_restores_the_same_values(shape: tuple[int, int]) -> None:
    integration: Any = pytest.importorskip("transformers.integrations.finegrained_fp8")
    scheme = FLOAT8_SCHEMES["fp8_block"]
    codes, scales = encode_float8(torch.randn(shape), scheme)
    theirs = integration.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    assert torch.equal(theirs, decode_float8(codes, scales, scheme))


@pytest.mark.parametrize("shape", [(37, 50), (128, 128)])
def test_compressed_tensors_restores_the_same_values(shape: tuple[int, int]) -> None:
    library: Any = pytest.importorskip("compressed_tensors.quantization")
    forward: Any = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    scheme = FLOAT8_SCHEMES["fp8_channel"]
    codes, scales = encode_float8(torch.randn(shape), scheme)
    args = library.QuantizationArgs(num_bits=8, type="float", strategy="channel")
    theirs = forward.dequantize(codes, scales, args=args)
    assert torch.equal(theirs, decode_float8(codes, scales, scheme).to(theirs.dtype))
