"""Small checkpoints, made by hand or by the libraries that users have."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from merganser.checkpoint import Checkpoint, TensorInfo

Tensors = dict[str, torch.Tensor]


def raw_file(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, well-formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def some_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(7, 4, generator=generator).to(torch.bfloat16),
        "norm.weight": torch.randn(4, generator=generator),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "none": torch.zeros(0, 3, dtype=torch.float16),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
    }


def write_shards(folder: Path, shards: dict[str, Tensors], index: str | None = None) -> None:
    """Write each shard, and an index under the name `index`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        if name.endswith(".safetensors"):
            save_file(tensors, folder / name)
        else:
            torch.save(tensors, folder / name)
    if index is not None:
        weight_map = {key: name for name, tensors in shards.items() for key in tensors}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def put(folder: Path, files: dict[str, object]) -> None:
    """Write files from bytes, or from tensors."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            write_shards(target.parent, {target.name: content})
        else:
            assert isinstance(content, bytes)
            target.write_bytes(content)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_all(checkpoint: Checkpoint) -> dict[str, bytes]:
    with checkpoint.reader() as reader:
        found = {}
        for name, tensor in checkpoint.tensors.items():
            buffer = bytearray(tensor.nbytes)
            reader.read_into(tensor, 0, memoryview(buffer))
            found[name] = bytes(buffer)
        return found


def check_equal(checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Names, types, shapes and bytes are those of `tensors`."""
    described = {name: (info.dtype.name, info.shape) for name, info in checkpoint.tensors.items()}
    assert described == {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
    assert read_all(checkpoint) == {name: tensor_bytes(tensor) for name, tensor in tensors.items()}


def only(checkpoint: Checkpoint) -> TensorInfo:
    (tensor,) = checkpoint.tensors.values()
    return tensor
