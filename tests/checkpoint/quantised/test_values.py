"""Dequantised values by their definitions, for every way of storing them, with partial blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merganser.checkpoint.formats.quantised.bits import unpack
from tests.checkpoint.quantised.making import check_parts, opened, pack, randn, saved, values, whole

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 77])
def test_bits(bits: int, count: int) -> None:
    numbers = whole(0, 1 << bits, 3, count)
    assert torch.equal(unpack(pack(numbers, bits), bits, count).long(), numbers)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((576, 300), (128, 128)),
        ((5, 7), (128, 128)),
        ((130, 257), (64, 32)),
        ((2, 130, 140), (128, 128)),
        ((9, 64), (1, 32)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_tiles(tmp_path: Path, shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype) -> None:
    """DeepSeek's, with edges that fill no tile, and stacks of experts."""
    weight = randn(*shape).to(E4M3)
    *lead, rows, columns = shape
    scale = (randn(*lead, -(-rows // block[0]), -(-columns // block[1]), seed=1).abs() + 0.1).to(dtype)
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    folder = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale, "b.bias": randn(3)}, settings)
    checkpoint = opened(folder)
    full = scale.float().repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    found = values(checkpoint)
    assert set(found) == {"a.weight", "b.bias"}
    assert torch.equal(found["a.weight"], weight.float() * full)
    check_parts(checkpoint, "a.weight")
    info = checkpoint.tensors["a.weight"]
    assert info.natural is not None
    assert (info.dtype.name, info.natural.name, info.shape) == ("float32", "bfloat16", shape)


@pytest.mark.parametrize("scale_shape", [(), (1,), (6, 1), (6,), (1, 8), (6, 2), (1, 1)])
def test_float8_per_tensor_row_column_and_group(tmp_path: Path, scale_shape: tuple[int, ...]) -> None:
    weight, scale = randn(6, 8).to(torch.float8_e5m2), randn(*scale_shape, seed=1).abs()
    tensors = {"a.weight": weight, "a.weight_scale": scale, "a.input_scale": randn(1), "x.k_scale": randn(1)}
    checkpoint = opened(saved(tmp_path, tensors, {"quant_method": "compressed-tensors"}))
    full = scale[:, None] if scale_shape == (6,) else scale
    full = full.repeat_interleave(4, 1) if scale_shape == (6, 2) else full
    assert torch.equal(values(checkpoint)["a.weight"], weight.float() * full)
    assert checkpoint.quantisation is not None
    assert set(checkpoint.quantisation.left_out) == {"a.input_scale", "x.k_scale"}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(tmp_path: Path, bits: int, ordered: bool, version: str) -> None:
    inputs, outputs, size = 96, 64, 32
    numbers, zeros = whole(0, 1 << bits, inputs, outputs), whole(0, 1 << bits, 3, outputs, seed=1)
    scales = randn(3, outputs, seed=2).half()
    order = torch.arange(inputs) // size if not ordered else torch.randperm(inputs) % 3
    stored_zeros = zeros if version == "gptq_v2" else (zeros - 1) & ((1 << bits) - 1)
    tensors = {
        "a.qweight": pack(numbers.T, bits).T,
        "a.qzeros": pack(stored_zeros, bits),
        "a.scales": scales,
        "a.bias": randn(outputs),
    }
    if ordered:
        tensors["a.g_idx"] = order.int()
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": version}
    checkpoint = opened(saved(tmp_path, tensors, settings))
    expected = ((numbers - zeros[order]).float() * scales.float()[order]).T
    assert torch.equal(values(checkpoint)["a.weight"], expected)
    check_parts(checkpoint, "a.weight")


def test_awq(tmp_path: Path) -> None:
    inputs, outputs, size = 64, 40, 32
    numbers, zeros = whole(0, 16, inputs, outputs), whole(0, 16, 2, outputs, seed=1)
    scales = randn(2, outputs, seed=2).half()

    def words(table: torch.Tensor) -> torch.Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that lies at each place of a word
        return pack(table.view(len(table), -1, 8)[:, :, order].flatten(1), 4)

    tensors = {"a.qweight": words(numbers), "a.qzeros": words(zeros), "a.scales": scales}
    checkpoint = opened(saved(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "group_size": size}))
    order = torch.arange(inputs) // size
    assert torch.equal(values(checkpoint)["a.weight"], ((numbers - zeros[order]).float() * scales.float()[order]).T)
    check_parts(checkpoint, "a.weight")
    assert checkpoint.quantisation is not None
    assert checkpoint.quantisation.rescaled


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx(tmp_path: Path, bits: int) -> None:
    numbers = whole(0, 1 << bits, 6, 128)
    scales, biases = randn(6, 2).bfloat16(), randn(6, 2, seed=1).bfloat16()
    tensors = {"a.weight": pack(numbers, bits).view(torch.uint32), "a.scales": scales, "a.biases": biases}
    checkpoint = opened(saved(tmp_path, tensors, {"group_size": 64, "bits": bits}, key="quantization"))
    spread = [each.float().repeat_interleave(64, 1) for each in (scales, biases)]
    assert torch.equal(values(checkpoint)["a.weight"], numbers * spread[0] + spread[1])
    check_parts(checkpoint, "a.weight")


def test_modelopt_nvfp4(tmp_path: Path) -> None:
    """Two scales, both multiplied."""
    code = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = whole(0, 16, 4, 32)
    scale, overall = randn(4, 2, seed=1).abs().to(E4M3), torch.tensor(0.03)
    packed = (numbers[:, 0::2] | numbers[:, 1::2] << 4).to(torch.uint8)
    tensors = {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": overall, "a.input_scale": randn(1)}
    checkpoint = opened(saved(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"}))
    signed = code[numbers & 7] * torch.where(numbers > 7, -1.0, 1.0)
    expected = signed * (scale.float() * overall).repeat_interleave(16, 1)
    assert torch.equal(values(checkpoint)["a.weight"], expected)
    check_parts(checkpoint, "a.weight")


@pytest.mark.parametrize("piece", [1, 4096])
def test_mxfp4_of_gpt_oss(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers dequantises it, read in any pieces."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    monkeypatch.setattr("merganser.checkpoint.derived.derived._PIECE", piece)
    monkeypatch.setattr("merganser.checkpoint.derived.derived._SLAB", 24 * 5)
    blocks, scales = whole(0, 256, 3, 24, 2, 16).to(torch.uint8), whole(100, 140, 3, 24, 2, seed=1).to(torch.uint8)
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales, "e.gate_up_proj_bias": randn(3, 24)}
    checkpoint = opened(saved(tmp_path, tensors, {"quant_method": "mxfp4"}))
    found = values(checkpoint)
    assert set(found) == {"e.gate_up_proj", "e.gate_up_proj_bias"}
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert found["e.gate_up_proj"].shape == (3, 64, 24)
    assert torch.equal(found["e.gate_up_proj"], expected)
    check_parts(checkpoint, "e.gate_up_proj")
