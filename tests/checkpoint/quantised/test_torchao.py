"""Weights of torchao: values by their definition, and files that are malformed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merganser.engine.merge import merge
from merganser.errors import CheckpointError
from tests.checkpoint.quantised.making import Tensors, check_parts, opened, randn, values, whole
from tests.making import make_recipe

NAME = "model.layers.0.mlp.up_proj"
KINDS = {
    "Float8Tensor": {"block_size": [1, 96]},
    "Int8Tensor": {"block_size": [1, 96]},
    "IntxUnpackedToInt8Tensor": {"block_size": [1, 32], "target_dtype": {"_type": "torch.dtype", "_data": "int4"}},
}


def parts(kind: str, block: list[int]) -> Tensors:
    """Numbers and scales of a weight of 10 x 96."""
    grid = (-(-10 // block[0]), 96 // block[1])
    numbers = randn(10, 96).to(torch.float8_e4m3fn) if kind == "Float8Tensor" else whole(-8, 8, 10, 96).to(torch.int8)
    found = {"qdata": numbers, "scale": randn(*grid, seed=1).abs()}
    if kind != "Float8Tensor":
        found["zero_point"] = whole(-3, 3, *grid, seed=2).to(torch.int8)
    return found


def put(folder: Path, tensors: Tensors, metadata: dict[str, Any]) -> Path:
    """Write a weight and a bias as torchao flattens them."""
    folder.mkdir()
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "torchao"}}
    (folder / "config.json").write_text(json.dumps(config))
    held = {f"{NAME}._weight_{part}": tensor for part, tensor in tensors.items()} | {f"{NAME}.bias": randn(10)}
    texts = {name: each if isinstance(each, str) else json.dumps(each) for name, each in metadata.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt", "tensor_names": "[]", **texts})
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [[1, 96], [1, 32], [10, 96], [4, 48]])
def test_values(tmp_path: Path, kind: str, block: list[int]) -> None:
    own = parts(kind, block)
    about = {"_type": kind, "_data": KINDS[kind] | {"block_size": block}}
    checkpoint = opened(put(tmp_path / "m", own, {f"{NAME}.weight": about}))
    full = {
        part: own[part].float().repeat_interleave(block[0], 0)[:10].repeat_interleave(block[1], 1)
        for part in own
        if part != "qdata"
    }
    expected = (own["qdata"].float() - full.get("zero_point", torch.zeros(()))) * full["scale"]
    found = values(checkpoint)
    assert found.keys() == {f"{NAME}.weight", f"{NAME}.bias"}
    assert torch.equal(found[f"{NAME}.weight"], expected)
    check_parts(checkpoint, f"{NAME}.weight")


@pytest.mark.parametrize(("shape", "size"), [((10, 96), 32), ((10, 96), 96), ((3, 6, 64), 16)])
def test_int4(tmp_path: Path, shape: tuple[int, ...], size: int) -> None:
    """Two numbers per byte, the first in the lower half; scales and zeros transposed, in the dtype of the model."""
    numbers = whole(-8, 8, *shape).to(torch.int8)
    groups = shape[-1] // size
    scale, zero = (randn(*shape[:-2], groups, shape[-2], seed=seed).bfloat16() for seed in (1, 2))
    packed = (numbers[..., ::2] & 15) | (numbers[..., 1::2] << 4)
    about = {"_type": "Int4Tensor", "_data": {"block_size": [1] * (len(shape) - 1) + [size], "activation_dtype": None}}
    found = opened(
        put(tmp_path / "m", {"qdata": packed, "scale": scale, "zero_point": zero}, {f"{NAME}.weight": about})
    )
    spread = [each.float().mT.repeat_interleave(size, -1) for each in (scale, zero)]
    assert torch.equal(values(found)[f"{NAME}.weight"], numbers.float() * spread[0] + spread[1])
    check_parts(found, f"{NAME}.weight")


def bad(changes: Tensors | None = None, without: str = "", about: Any = None) -> tuple[Tensors, dict[str, Any]]:
    own = parts("Int8Tensor", [1, 96]) | (changes or {})
    own.pop(without, None)
    entry = {"_type": "Int8Tensor", "_data": {"block_size": [1, 96]}} if about is None else about
    return own, {f"{NAME}.weight": entry}


def int4(changes: Tensors | None = None, without: str = "", block: Any = (1, 32)) -> tuple[Tensors, dict[str, Any]]:
    own = {"qdata": torch.ones(10, 48, dtype=torch.int8), "scale": torch.ones(3, 10), "zero_point": torch.ones(3, 10)}
    own |= changes or {}
    own.pop(without, None)
    block = list(block) if isinstance(block, tuple) else block
    return own, {f"{NAME}.weight": {"_type": "Int4Tensor", "_data": {"block_size": block}}}


BAD: dict[str, tuple[tuple[Tensors, dict[str, Any]], str]] = {
    "no metadata": ((bad()[0], {}), "the header of the file says nothing of"),
    "no JSON": (bad(about="{"), "metadata of"),
    "no class": (bad(about={"_data": {}}), "must give _type and _data"),
    "class": (bad(about={"_type": "MXTensor", "_data": {}}), "torchao's MXTensor cannot be read: its numbers are packed"),
    "tiles": (bad(about={"_type": "Int4TilePackedTo4dTensor", "_data": {}}), "the order of a GPU's matrix unit, which is another one on AMD"),
    "words": (bad(about={"_type": "Int4PlainInt32Tensor", "_data": {}}), "the file does not say which"),
    "int4: numbers": (int4({"qdata": torch.ones(10, 48)}), "must be a matrix of bytes"),
    "int4: no scale": (int4(without="scale"), "its scales"),
    "int4: no zero": (int4(without="zero_point"), "its zeros"),
    "int4: scale": (int4({"scale": torch.ones(10, 3)}), "must be floats of shape [3, 10], found float32 [10, 3]"),
    "int4: zero": (int4({"zero_point": torch.ones(3, 10).int()}), "must be floats of shape [3, 10], found int32"),
    "int4: group of zero": (int4(block=[1, 0]), "a divisor of 96 columns, found [1, 0]"),
    "int4: group": (int4(block=[1, 7]), "a divisor of 96 columns, found [1, 7]"),
    "int4: rows": (int4(block=[2, 32]), "a divisor of 96 columns, found [2, 32]"),
    "int4: block": (int4(block="x"), "a divisor of 96 columns, found 'x'"),
    "int4: scaled inputs": (int4({"act_pre_scale": torch.ones(96)}), "this part of torchao's Int4Tensor is not known"),
    "block": (bad(about={"_type": "Int8Tensor", "_data": {"block_size": [0, 96]}}), "block_size of its metadata"),
    "dims": (bad(about={"_type": "Int8Tensor", "_data": {"block_size": [96]}}), "block_size of its metadata"),
    "no scale": (bad(without="scale"), "its scales"),
    "grid": (bad({"scale": torch.ones(3, 7)}), "fits neither"),
    "zeros": (bad({"zero_point": torch.ones(10, 1)}), "must be whole numbers"),
    "zeros' shape": (bad({"zero_point": torch.ones(5, 1, dtype=torch.int8)}), "must be whole numbers"),
    "dtype": (bad({"qdata": torch.ones(10, 96)}), "must be a matrix of int8"),
    "vector": (bad({"qdata": torch.ones(96, dtype=torch.int8)}), "must be a matrix of int8"),
    "more parts": (bad({"act_pre_scale": torch.ones(96)}), "this part of torchao's Int8Tensor is not known"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_malformed(tmp_path: Path, case: str) -> None:
    (tensors, metadata), message = BAD[case]
    folder = put(tmp_path / "m", tensors, metadata)
    with pytest.raises(CheckpointError) as found:
        merge(make_recipe("linear", [folder], None, {"weight": 1}), tmp_path / "out")
    assert message in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
