"""Weights of HQQ: values by their definition, and files that are malformed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.engine.merge import merge
from merganser.errors import CheckpointError
from tests.checkpoint.quantised.making import Tensors, check_parts, opened, randn, saved, values, whole
from tests.making import make_recipe

LAYER = "model.layers.0.mlp.up_proj"
SHAPE = (12, 40)
SETTINGS = {"quant_method": "hqq"}
PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}


def text(content: str) -> torch.Tensor:
    return torch.tensor([ord(letter) for letter in content], dtype=torch.uint8)


def layer(packing: str, axis: int, groups: int = 24) -> tuple[Tensors, torch.Tensor]:
    """The tensors of a layer of 480 values, and the values: word for word, a part of the rows after another."""
    bits, per_word = PACKINGS[packing]
    lines, columns = (groups, 480 // groups) if axis == 1 else (480 // groups, groups)
    numbers = whole(0, 1 << bits, lines, columns)
    scale, zero = (randn(*((groups, 1) if axis == 1 else (1, groups)), seed=seed) for seed in (1, 2))
    step = -(-lines // per_word)
    padded = torch.zeros(step * per_word, columns, dtype=torch.int64)
    padded[:lines] = numbers
    words = torch.zeros(step, columns, dtype=torch.int64)
    for part in range(per_word):
        words = words * 2**bits + padded[part * step : (part + 1) * step]
    tensors = {
        "W_q": words.to(torch.int32 if packing == "3bit_32" else torch.uint8),
        "scale": scale,
        "zero": zero,
        "shape": torch.tensor(SHAPE),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "packing": text(packing),
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "compute_dtype": text("torch.float32"),
        "view_as_float": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, ((numbers.float() - zero) * scale).view(SHAPE)


def put(folder: Path, tensors: Tensors) -> Path:
    held = {f"{LAYER}.{name}": tensor for name, tensor in tensors.items()} | {f"{LAYER}.bias": randn(12)}
    return saved(folder, held, SETTINGS)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("packing", PACKINGS)
def test_values(tmp_path: Path, packing: str, axis: int) -> None:
    tensors, expected = layer(packing, axis, groups=24 if axis == 1 else 60)
    checkpoint = opened(put(tmp_path / "m", tensors))
    found = values(checkpoint)
    assert found.keys() == {f"{LAYER}.weight", f"{LAYER}.bias"}
    assert torch.equal(found[f"{LAYER}.weight"], expected)
    check_parts(checkpoint, f"{LAYER}.weight")
    assert checkpoint.left_out.keys() == {f"{LAYER}.{name}" for name in tensors if name not in ("W_q", "scale", "zero")}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": ({"scale": None}, "its scales"),
    "no zero": ({"zero": None}, "its zero points"),
    "no shape": ({"shape": None}, "a number of its layout"),
    "packing": ({"packing": text("5bit_u8")}, "numbers packed as '5bit_u8' cannot be read"),
    "shape": ({"shape": torch.tensor([480])}, "must be two numbers, and 0 or 1"),
    "large shape": ({"shape": torch.tensor([1 << 40, 3])}, "must be two numbers, and 0 or 1"),
    "axis": ({"axis": torch.tensor(2, dtype=torch.int32)}, "must be two numbers, and 0 or 1"),
    "axis kind": ({"axis": torch.tensor(1.0)}, "must be a few whole numbers"),
    "dtype": ({"W_q": torch.zeros(12, 20)}, "must be a matrix of uint8"),
    "size": ({"W_q": torch.zeros(11, 20, dtype=torch.uint8)}, "are not those of [12, 40] in 24 groups"),
    "groups": ({"scale": torch.ones(7, 1), "zero": torch.ones(7, 1)}, "7 groups do not divide"),
    "zero points": ({"zero": torch.ones(1, 24)}, "and zero points [1, 24] are not those of [12, 40] in 24 groups"),
    "scales": ({"scale": torch.ones(24, 1, dtype=torch.uint8)}, "must be floats, one of each per group"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed(tmp_path: Path, case: str) -> None:
    changes, message = BAD[case]
    tensors = layer("4bit_u8", 1)[0] | changes
    folder = put(tmp_path / "m", {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(CheckpointError) as found:
        merge(make_recipe("linear", [folder], None, {"weight": 1}), tmp_path / "out")
    assert message in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
