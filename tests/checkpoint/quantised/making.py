"""Quantised checkpoints, made by hand as other programs write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from merganser.checkpoint import Checkpoint, Reader, open_checkpoint

Tensors = dict[str, Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, tensors: Tensors, settings: dict[str, Any] | None, *, key: str = "quantization_config") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "torch_dtype": "bfloat16"} | ({} if settings is None else {key: settings})
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def opened(folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.quantisation is not None
    assert checkpoint.quantisation.unreadable is None
    return checkpoint


def values(checkpoint: Checkpoint) -> Tensors:
    with Reader() as reader:
        return {name: reader.tensor(info) for name, info in checkpoint.tensors.items()}


def check_parts(checkpoint: Checkpoint, name: str) -> None:
    """Any rows read alone equal those of the whole."""
    info = checkpoint.tensors[name]
    width = info.shape[-1]
    with Reader() as reader:
        expected = reader.tensor(info).reshape(-1, width)
        for first in range(0, len(expected), 5):
            for count in (1, 3, 9):
                last = min(first + count, len(expected))
                buffer = bytearray((last - first) * width * 4)
                reader.read_into(info, first * width * 4, memoryview(buffer))
                found = torch.frombuffer(buffer, dtype=torch.float32).view(last - first, width)
                assert torch.equal(found, expected[first:last])


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Pack the numbers of each row back to back into words of 32 bits, one bit at a time."""
    rows, count = numbers.shape
    bit = (numbers[:, :, None] >> torch.arange(bits)) & 1
    flat = torch.zeros(rows, -(-count * bits // 32) * 32, dtype=torch.int64)
    flat[:, : count * bits] = bit.reshape(rows, -1)
    return (flat.view(rows, -1, 32) << torch.arange(32)).sum(-1).to(torch.uint32).view(torch.int32)
