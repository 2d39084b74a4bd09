"""Values equal those of the libraries that write the files, bit for bit; skipped where a library is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.quantised.making import check_parts, opened, randn, saved, values


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(32, 128), (33, 65), (7, 9), (32, 48)])
@pytest.mark.parametrize("block", [64, 128])
def test_bitsandbytes(tmp_path: Path, kind: str, nested: bool, shape: tuple[int, int], block: int) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    weight = randn(*shape) * 0.02
    packed, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
    tensors = {"a.weight": packed} | {f"a.weight.{name}": each for name, each in state.as_dict(packed=True).items()}
    checkpoint = opened(saved(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}))
    found = values(checkpoint)["a.weight"]
    assert (found - weight).norm() < 0.2 * weight.norm()
    # for even widths that no whole blocks fill, the library's code for CPUs gives each row blocks of its own, though it
    # quantised without regard to rows
    if shape[1] % block == 0 or shape[1] % 2:
        assert torch.equal(found, functional.dequantize_4bit(packed, state))
    check_parts(checkpoint, "a.weight")


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    codes, largest, _ = functional.int8_vectorwise_quant(randn(9, 33).half())
    tensors = {"a.weight": codes, "a.SCB": largest, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    checkpoint = opened(saved(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}))
    assert torch.equal(values(checkpoint)["a.weight"], functional.int8_vectorwise_dequant(codes, largest))
    check_parts(checkpoint, "a.weight")


SCHEMES: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, (40, 96)),
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, (40, 96)),
    ("pack-quantized", {"num_bits": 3, "strategy": "channel"}, (37, 50)),
    ("pack-quantized", {"num_bits": 3, "strategy": "channel", "symmetric": False}, (37, 50)),
    ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, (37, 50)),
    ("pack-quantized", {"num_bits": 6, "strategy": "group", "group_size": 25}, (5, 50)),
    ("int-quantized", {"num_bits": 8, "strategy": "channel"}, (37, 50)),
    ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, (37, 50)),
    ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, (5, 6)),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, (37, 50)),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, (37, 50)),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]}, (40, 50)),
    ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, (6, 64)),
    ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, (6, 64)),
]


@pytest.mark.parametrize(("form", "args", "shape"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors(
    tmp_path: Path, form: str, args: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """In the dtype of the scales, in which the library computes; where that is narrow, our float32 is rounded to it."""
    compressors: Any = pytest.importorskip("compressed_tensors.compressors")
    quantization: Any = pytest.importorskip("compressed_tensors.quantization")
    helpers: Any = pytest.importorskip("compressed_tensors.quantization.utils")
    weight = (randn(*shape) * 0.05).to(dtype)
    arguments = quantization.QuantizationArgs(**args)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    grouped = _grouped(weight, args)
    low, high = grouped.amin(-1), grouped.amax(-1)
    overall = None
    if args["strategy"] == "tensor_group":
        overall = helpers.generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
    scale, zero = helpers.calculate_qparams(low, high, arguments, global_scale=overall)
    state = {"weight": weight, "weight_scale": scale.to(torch.float32 if overall is not None else scale.dtype)}
    if args.get("symmetric") is False:
        state["weight_zero_point"] = zero
    if overall is not None:
        state["weight_global_scale"] = overall
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": args}}}
    if args["strategy"] == "block":
        settings["weight_block_size"] = args["block_structure"]
    checkpoint = opened(saved(tmp_path, {f"a.{name}": each for name, each in stored.items()}, settings))
    found = values(checkpoint)["a.weight"]
    assert found.shape == shape
    assert torch.equal(found.to(expected.dtype), expected)
    assert (found - weight.float()).norm() < 0.35 * weight.float().norm()
    check_parts(checkpoint, "a.weight")


def _grouped(weight: torch.Tensor, args: dict[str, Any]) -> torch.Tensor:
    """The elements that share a scale, in the last dimension."""
    if args["strategy"] == "tensor":
        return weight.reshape(1, -1)
    if args["strategy"] == "channel":
        return weight[:, None]
    if args["strategy"] == "block":
        size = args["block_structure"][0]
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size, 0, -weight.shape[0] % size))
        return padded.unfold(0, size, size).unfold(1, size, size).flatten(2)
    return weight.view(len(weight), -1, args["group_size"])
