"""The peak memory of `merganser calibrate` for Gram matrices, on random models of one width and two depths."""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .processes import LENGTH, merganser

BAR = 0.25
SEQUENCES = 8


@dataclass(frozen=True)
class Shape:
    """A Llama of random numbers whose embedding is its head.

    Args:
        width: Of hidden states.
        inner: Of the MLP.
        blocks: Number of blocks.
        vocabulary: Rows of the embedding.
    """

    width: int = 1280
    inner: int = 2048
    blocks: int = 26
    vocabulary: int = 49_152

    @property
    def block(self) -> int:
        """Parameters of a block, norms left out."""
        return 4 * self.width**2 + 3 * self.width * self.inner

    @property
    def parameters(self) -> int:
        """Parameters of the model, norms left out."""
        return self.blocks * self.block + self.vocabulary * self.width

    @property
    def grams(self) -> int:
        """Bytes of the Gram matrices of one block in float32: of three inputs of the width, and one of the MLP's."""
        return 4 * (3 * self.width**2 + self.inner**2)


def measure(zoo: Path, folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak on a model, and on one with twice the blocks; a tiny model says what a process takes anyway."""
    whole = Shape()
    shapes = {
        "tiny": Shape(width=64, inner=64, blocks=1),
        "model": whole,
        "twice_the_blocks": Shape(blocks=2 * whole.blocks),
    }
    rows: dict[str, Any] = {}
    for name, shape in shapes.items():
        model, out = make_random(shape, zoo / "base", folder / name), folder / "out"
        command = ["calibrate", str(model), "--data", str(zoo / "texts" / "english.train.txt"), "--out", str(out)]
        usage = merganser([*command, "--sequences", str(SEQUENCES), "--length", str(LENGTH), "--quiet"], folder)
        rows[name] = {
            "parameters": shape.parameters,
            "share_of_a_block": round(shape.block / shape.parameters, 4),
            "bfloat16_bytes": 2 * shape.parameters,
            "peak_bytes": usage.peak_bytes,
            "cpu_seconds": round(usage.cpu_seconds, 1),
        }
        shutil.rmtree(model)
        shutil.rmtree(out)
    start, peak, twice = (rows[name]["peak_bytes"] for name in shapes)
    return {
        "tokens": SEQUENCES * LENGTH,
        "bar_bytes": round(BAR * 2 * whole.parameters) + whole.grams,
        "peak_above_the_tiny_model_bytes": peak - start,
        "twice_over_once": round(twice / peak, 4),
        "grams_of_one_block_bytes": whole.grams,
        "models": rows,
    }


def make_random(shape: Shape, like: Path, folder: Path) -> Path:
    """Write a checkpoint of random numbers, the same in every block, a shard for each, with the tokenizer of another model."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def drawn(*sides: int) -> torch.Tensor:
        return (0.02 * torch.randn(sides, generator=generator)).bfloat16()

    width, inner = shape.width, shape.inner
    ones = torch.ones(width, dtype=torch.bfloat16)
    outside = {"model.embed_tokens.weight": drawn(shape.vocabulary, width), "model.norm.weight": ones}
    sides = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    sides |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    block = {name: drawn(*own) for name, own in sides.items()}
    block |= {f"{name}_layernorm": ones.clone() for name in ("input", "post_attention")}
    index: dict[str, str] = {}
    for number in range(-1, shape.blocks):
        tensors = (
            outside if number < 0 else {f"model.layers.{number}.{name}.weight": own for name, own in block.items()}
        )
        file = f"model-{number + 2:05d}-of-{shape.blocks + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    config = json.loads((like / "config.json").read_text(encoding="utf-8"))
    heads = width // 64
    config |= {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": shape.blocks, "head_dim": 64}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": shape.vocabulary}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in like.glob("*token*"):
        shutil.copy(file, folder)
    return folder
