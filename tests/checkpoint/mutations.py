"""Tiny valid checkpoints of every format, and random damage to their files: bytes, lengths, and values of their JSON."""

from __future__ import annotations

import copy
import json
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from merganser.checkpoint import Reader, open_checkpoint
from merganser.errors import MergeError
from tests.checkpoint.gguf.making import LLAMA, random_blocks
from tests.checkpoint.gguf.making import written as write_gguf
from tests.checkpoint.quantised.making import Tensors, pack, randn, saved, whole

LAYER = "model.layers.0.mlp.up_proj"
E4M3 = torch.float8_e4m3fn
NUMBERS = (0, 1, -1, 2, 3, 7, 127, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
VALUES = (*NUMBERS, None, True, "", "x", "\0", [], {}, [[]], 0.5, 1e308, -0.0, "F32", "I64", "weight", [1, 2], {"a": 1})
ENCODED = tuple(struct.pack("<Q", number % (1 << 64)) for number in NUMBERS)


def _text(content: object) -> torch.Tensor:
    data = content if isinstance(content, str) else json.dumps(content)
    return torch.tensor(list(data.encode()), dtype=torch.uint8)


def _plain(folder: Path) -> None:
    saved(folder, {f"{LAYER}.weight": randn(6, 4), "model.norm.weight": randn(4)}, None)


def _sharded(folder: Path) -> None:
    _plain(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": randn(6, 4)}, folder / "model-00002-of-00002.safetensors")
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    weight_map = {f"{LAYER}.weight": first, "model.norm.weight": first, "lm_head.weight": second}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _quantised(settings: dict[str, Any], tensors: Tensors, key: str = "quantization_config") -> Callable[[Path], None]:
    held = {f"{LAYER}{name}": tensor for name, tensor in tensors.items()}
    return lambda folder: saved(folder, held, settings, key=key) and None


def _torchao(folder: Path) -> None:
    folder.mkdir(parents=True)
    settings = {"quant_method": "torchao"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    parts = {"qdata": whole(-8, 8, 8, 16).to(torch.int8), "scale": torch.ones(4, 8), "zero_point": torch.ones(4, 8)}
    about = {"_type": "Int4Tensor", "_data": {"block_size": [1, 8]}}
    metadata = {f"{LAYER}.weight": json.dumps(about)}
    save_file({f"{LAYER}._weight_{n}": t for n, t in parts.items()}, folder / "model.safetensors", metadata)


def _gguf(folder: Path) -> None:
    folder.mkdir(parents=True)
    kinds = gguf.GGMLQuantizationType
    q = randn(32, 32).numpy()
    tensors = {
        "token_embd.weight": (random_blocks(kinds.Q4_0, 4, 1), kinds.Q4_0),
        "blk.0.attn_q.weight": (q, kinds.F32),
        "blk.0.ffn_up.weight": (q.astype(np.float16), kinds.F16),
        "blk.0.ffn_gate_exps.weight": (np.stack([q, q]), kinds.F32),
    }
    write_gguf(folder / "m.gguf", "llama", tensors, dict(LLAMA))
    (folder / "config.json").write_text('{"model_type": "llama"}')


def _distributed(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {f"{LAYER}.weight": randn(6, 4), "optim": {"x": torch.ones(2)}}
        dcp.save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def _pickled(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.save({f"{LAYER}.weight": randn(6, 4), "norm": randn(4)}, folder / "pytorch_model.bin")


def _original(folder: Path) -> None:
    folder.mkdir(parents=True)
    layer = {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wo": (8, 8)}
    tensors = {f"layers.0.attention.{name}.weight": randn(*shape) for name, shape in layer.items()}
    tensors |= {f"layers.0.feed_forward.w{k}.weight": randn(*((8, 12) if k == 2 else (12, 8))) for k in (1, 2, 3)}
    tensors |= {"tok_embeddings.weight": randn(5, 8), "norm.weight": randn(8), "output.weight": randn(5, 8)}
    tensors |= {f"layers.0.{name}_norm.weight": randn(8) for name in ("attention", "ffn")}
    save_file(tensors, folder / "consolidated.safetensors")
    sizes = {"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 1e4}
    (folder / "params.json").write_text(json.dumps(sizes | {"sliding_window": 8, "hidden_dim": 12}))


_STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 32], "nested_blocksize": 256}
_NESTED = {
    ".weight": whole(0, 256, 128, 1).to(torch.uint8),
    ".weight.absmax": whole(0, 256, 4).to(torch.uint8),
    ".weight.quant_map": randn(16),
    ".weight.nested_absmax": torch.ones(1),
    ".weight.nested_quant_map": randn(256),
    ".weight.quant_state.bitsandbytes__nf4": _text({**_STATE, "nested_offset": 0.1}),
}
_HQQ = {
    ".W_q": whole(0, 256, 4, 8).to(torch.uint8),
    ".scale": torch.ones(8, 1),
    ".zero": torch.ones(8, 1),
    ".shape": torch.tensor([8, 8]),
    ".axis": torch.tensor(1),
    ".packing": _text("4bit_u8"),
}
_PACKED = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}}
FORMATS: dict[str, Callable[[Path], None]] = {
    "safetensors": _plain,
    "index": _sharded,
    "pickled": _pickled,
    "distributed": _distributed,
    "original": _original,
    "gguf": _gguf,
    "fp8": _quantised(
        {"quant_method": "fp8", "weight_block_size": [4, 4]},
        {".weight": randn(6, 10).to(E4M3), ".weight_scale_inv": torch.ones(2, 3)},
    ),
    "packed": _quantised(
        _PACKED,
        {
            ".weight_packed": pack(whole(0, 16, 8, 32), 4),
            ".weight_scale": torch.ones(8, 2),
            ".weight_zero_point": pack(whole(0, 16, 2, 8), 4).T,
            ".weight_shape": torch.tensor([8, 32]),
            ".weight_g_idx": torch.arange(32) // 16,
        },
    ),
    "int8": _quantised(_PACKED, {".weight": whole(-8, 8, 4, 8).to(torch.int8), ".weight_scale": torch.ones(4, 1)}),
    "gptq": _quantised(
        {"quant_method": "gptq", "bits": 3, "group_size": 32, "checkpoint_format": "gptq"},
        {
            ".qweight": whole(-(1 << 31), 1 << 31, 6, 8).int(),
            ".qzeros": whole(-9, 9, 2, 1).int(),
            ".scales": torch.ones(2, 8),
            ".g_idx": (torch.arange(64) // 32).int(),
        },
    ),
    "awq": _quantised(
        {"quant_method": "awq", "bits": 4, "version": "gemm"},
        {".qweight": whole(-9, 9, 16, 2).int(), ".qzeros": whole(-9, 9, 2, 2).int(), ".scales": torch.ones(2, 16)},
    ),
    "bitsandbytes": _quantised({"quant_method": "bitsandbytes", "load_in_4bit": True}, _NESTED),
    "llm.int8": _quantised(
        {"quant_method": "bitsandbytes"}, {".weight": whole(-8, 8, 4, 8).to(torch.int8), ".SCB": torch.ones(4)}
    ),
    "mxfp4": _quantised(
        {"quant_method": "mxfp4"},
        {"_blocks": whole(0, 256, 2, 8, 2, 16).to(torch.uint8), "_scales": whole(120, 130, 2, 8, 2).to(torch.uint8)},
    ),
    "nvfp4": _quantised(
        _PACKED,
        {
            ".weight_packed": whole(0, 256, 8, 16).to(torch.uint8),
            ".weight_scale": torch.ones(8, 2).to(E4M3),
            ".weight_global_scale": torch.ones(1),
        },
    ),
    "mlx": _quantised(
        {"group_size": 32, "bits": 4, LAYER: {"group_size": 32, "bits": 4}},
        {
            ".weight": whole(0, 1 << 31, 8, 8).to(torch.uint32),
            ".scales": torch.ones(8, 2),
            ".biases": torch.ones(8, 2),
        },
        key="quantization",
    ),
    "torchao": _torchao,
    "hqq": _quantised({"quant_method": "hqq"}, _HQQ),
}


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one file of a checkpoint at random; return what was done."""
    file = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    data = file.read_bytes()
    made = _changed_json(file.name, data, draw) if draw.random() < 0.6 else None
    if made is None:
        made = _changed_bytes(data, draw)
    file.write_bytes(made[0])
    return f"{file.name}: {made[1]}"


def _changed_json(name: str, data: bytes, draw: random.Random) -> tuple[bytes, str] | None:
    """Change a value of a JSON file, or of the header of a safetensors file, whose length follows."""
    header = name.endswith(".safetensors")
    if not header and not name.endswith(".json"):
        return None
    start = 8 + int.from_bytes(data[:8], "little") if header else len(data)
    try:
        content = json.loads(data[8:start] if header else data)
    except ValueError:
        return None
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if isinstance(content, dict | list):
        walk(content)
    if not places:
        return None
    node, key = draw.choice(places)
    kind = draw.choice(("value", "value", "value", "drop", "copy", "rename"))
    value = copy.deepcopy(draw.choice(VALUES))
    if isinstance(node[key], str) and node[key].startswith("{") and draw.random() < 0.8:
        # torchao keeps JSON in strings
        inner = _changed_json(".json", node[key].encode(), draw)
        node[key] = node[key] if inner is None else inner[0].decode()
    elif kind == "drop":
        del node[key]
    elif kind == "copy":
        other, place = draw.choice(places)
        if place in other if isinstance(other, dict) else place < len(other):
            node[key] = copy.deepcopy(other[place])
    elif kind == "rename" and isinstance(node, dict):
        node[f"{key}{draw.choice(('_scale', '.weight', 'x', '_blocks', '.qweight', '_packed'))}"] = node.pop(key)
    else:
        node[key] = value
    text = json.dumps(content).encode()
    return (len(text).to_bytes(8, "little") + text + data[start:] if header else text), f"{kind} of {key!r}: {value!r}"


def _changed_bytes(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    kind = draw.choice(("flip", "flip", "flip", "number", "number", "cut", "insert", "swap", "empty"))
    changed = bytearray(data)
    # most of what can go wrong is told at the beginning
    limit = max(1, len(data) if draw.random() < 0.3 else min(len(data), 400))
    at = draw.randrange(limit)
    if kind == "flip":
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(limit)
            if place < len(changed):
                changed[place] = draw.randrange(256)
    elif kind == "number":
        changed[at : at + 8] = draw.choice(ENCODED)
    elif kind == "cut":
        del changed[at:]
    elif kind == "insert":
        changed[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 9)))
    elif kind == "swap":
        other = draw.randrange(limit)
        changed[at : at + 4], changed[other : other + 4] = changed[other : other + 4], changed[at : at + 4]
    else:
        changed.clear()
    return bytes(changed), f"{kind} at {at}"


def refused(folder: Path) -> bool:
    """Open a checkpoint and read everything in it; return whether it was refused. Any other error is a defect."""
    problem = None
    try:
        checkpoint = open_checkpoint(str(folder))
        if checkpoint.quantisation is not None and checkpoint.quantisation.unreadable is not None:
            problem = checkpoint.quantisation.unreadable
        else:
            with Reader() as reader:
                for tensor in checkpoint.tensors.values():
                    reader.tensor(tensor)
    except MergeError as error:
        problem = str(error)
    assert problem is None or (problem.strip() and "\n" not in problem)
    return problem is not None
