"""GGUF files, written with the package of llama.cpp's authors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


def written(
    file: Path,
    architecture: str,
    tensors: dict[str, tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]],
    numbers: dict[str, int | float] | None = None,
    *,
    more: dict[str, int] | None = None,
) -> Path:
    """Write tensors: values as they are, or bytes of blocks as uint8, with their types."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (numbers or {}).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
    for key, value in (more or {}).items():
        writer.add_uint16(key, value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "déf"])
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, blocks: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random bytes of blocks, with scales that are finite."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = np.random.default_rng(seed).integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    # where float16 scales lie, at the start or at the end of a block, keep the exponent small
    for place in (1, 3, size - 1, size - 3):
        if 0 <= place < size:
            data[:, :, place] &= 0x3B
    return data.reshape(rows, -1)


LLAMA = {"attention.head_count": 4, "attention.head_count_kv": 2, "block_count": 1, "embedding_length": 32}


def llama(seed: int = 0) -> Tensors:
    """A layer of Llama by the names of GGUF."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    return {
        "token_embd.weight": weight(48, 32),
        "output_norm.weight": weight(32),
        "blk.0.attn_norm.weight": weight(32),
        "blk.0.attn_q.weight": weight(32, 32),
        "blk.0.attn_k.weight": weight(16, 32),
        "blk.0.attn_v.weight": weight(16, 32),
        "blk.0.attn_output.weight": weight(32, 32),
        "blk.0.ffn_norm.weight": weight(32),
        "blk.0.ffn_gate.weight": weight(64, 32),
        "blk.0.ffn_up.weight": weight(64, 32),
        "blk.0.ffn_down.weight": weight(32, 64),
    }
