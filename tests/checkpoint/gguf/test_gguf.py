"""GGUF read as the checkpoint it was made from: every type, names, and transforms undone; equal to the package's values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T

from merganser.checkpoint import Reader, open_checkpoint
from merganser.checkpoint.formats.gguf.header import TYPES
from merganser.checkpoint.formats.gguf.names import FAMILIES
from merganser.checkpoint.formats.gguf.values import PLAIN, UNREADABLE
from tests.checkpoint.gguf.making import LLAMA, llama, random_blocks, written
from tests.checkpoint.quantised.making import check_parts, values

QUANTISED = [kind for kind in T if kind.name not in PLAIN and kind.name not in UNREADABLE]


def configured(folder: Path, **more: object) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1} | more
    (folder / "config.json").write_text(json.dumps(config))


def test_sizes_of_types() -> None:
    known = {T(number).name: (kind.values, kind.nbytes) for number, kind in TYPES.items() if number != T.Q8_1}
    assert known == {kind.name: gguf.GGML_QUANT_SIZES[kind] for kind in T if kind != T.Q8_1}


@pytest.mark.parametrize("kind", QUANTISED, ids=[kind.name for kind in QUANTISED])
def test_every_type_equals_the_package(tmp_path: Path, kind: T) -> None:
    blocks = random_blocks(kind, 7, 2)
    expected = gguf.quants.dequantize(blocks, kind)
    written(tmp_path / "m.gguf", "qwen2", {"blk.0.ffn_up.weight": (blocks, kind)})
    configured(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.quantisation is not None
    assert checkpoint.quantisation.schemes == (f"GGUF {kind.name}",)
    found = values(checkpoint)["model.layers.0.mlp.up_proj.weight"]
    finite = np.isfinite(expected)
    assert finite.any()
    assert np.array_equal(found.numpy()[finite], expected[finite])
    if finite.all():
        check_parts(checkpoint, "model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16])
def test_llama(tmp_path: Path, kind: T) -> None:
    """Rows of queries and keys are in another order in the file, and nothing else differs."""
    stored = llama()
    tensors = {}
    for name, tensor in stored.items():
        own = T.F32 if tensor.dim() == 1 else kind
        tensors[name] = (gguf.quants.quantize(tensor.numpy(), own), own)
    written(tmp_path / "m.gguf", "llama", {**tensors, "rope_freqs.weight": (np.ones(4, np.float32), T.F32)}, LLAMA)
    configured(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    assert checkpoint.quantised is None
    found = values(checkpoint)
    assert len(found) == len(stored)

    def usual(name: str, heads: int) -> torch.Tensor:
        rows = torch.from_numpy(gguf.quants.dequantize(*tensors[name]).reshape(stored[name].shape))
        return rows.view(heads, -1, 2, 32).transpose(1, 2).reshape(rows.shape)

    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], usual("blk.0.attn_q.weight", 4))
    assert torch.equal(found["model.layers.0.self_attn.k_proj.weight"], usual("blk.0.attn_k.weight", 2))
    up = found["model.layers.0.mlp.up_proj.weight"]
    assert str(up.dtype) == f"torch.{PLAIN[kind.name].name}"
    assert torch.equal(up, stored["blk.0.ffn_up.weight"].to(up.dtype))
    assert torch.equal(found["model.norm.weight"], stored["output_norm.weight"])
    natural = {info.natural.name for info in checkpoint.tensors.values() if info.natural}
    assert natural == {PLAIN[kind.name].name}
    for name in ("q_proj", "k_proj"):
        check_parts(checkpoint, f"model.layers.0.self_attn.{name}.weight")


def test_biases_and_norms(tmp_path: Path) -> None:
    bias = torch.arange(32.0)
    written(tmp_path / "m.gguf", "llama", {"blk.0.attn_q.bias": (bias.numpy(), T.F32)}, LLAMA)
    configured(tmp_path)
    found = values(open_checkpoint(str(tmp_path)))["model.layers.0.self_attn.q_proj.bias"]
    assert found.tolist() == bias.view(4, 4, 2).mT.flatten().tolist()
    other = tmp_path / "gemma"
    other.mkdir()
    norms = {"blk.0.attn_q_norm.weight": (bias.numpy(), T.F32), "blk.0.post_ffw_norm.weight": (bias.numpy(), T.F32)}
    written(other / "m.gguf", "gemma3", norms)
    configured(other)
    found_norms = values(open_checkpoint(str(other)))
    assert set(found_norms) == {
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.post_feedforward_layernorm.weight",
    }
    assert all(torch.equal(each, bias - 1) for each in found_norms.values())


@pytest.mark.parametrize(
    ("architecture", "name"), [("llama", "block_sparse_moe.experts.{}.w3"), ("qwen3moe", "mlp.experts.{}.up_proj")]
)
@pytest.mark.parametrize("kind", [T.F32, T.Q8_0])
def test_experts(tmp_path: Path, architecture: str, name: str, kind: T) -> None:
    stack = torch.randn(3, 6, 64).numpy()
    data = gguf.quants.quantize(stack, kind)
    written(tmp_path / "m.gguf", architecture, {"blk.0.ffn_up_exps.weight": (data, kind)})
    configured(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    expected = gguf.quants.dequantize(data, kind).reshape(stack.shape)
    found = values(checkpoint)
    assert len(found) == 3
    for expert in range(3):
        own = f"model.layers.0.{name.format(expert)}.weight"
        assert np.array_equal(found[own].numpy(), expected[expert])
        check_parts(checkpoint, own)
    assert sum(info.nbytes_stored for info in checkpoint.tensors.values()) == data.nbytes


def test_split_files(tmp_path: Path) -> None:
    names = list(llama())
    parts = [names[:4], names[4:]]
    for number, part in enumerate(parts):
        tensors = {name: (llama()[name].numpy(), T.F32) for name in part}
        file = tmp_path / f"m-{number + 1:05d}-of-00002.gguf"
        written(file, "llama", tensors, LLAMA, more={"split.no": number, "split.count": 2})
    configured(tmp_path)
    for reference in (tmp_path, tmp_path / "m-00001-of-00002.gguf"):
        checkpoint = open_checkpoint(str(reference))
        assert len(checkpoint.tensors) == len(names)
        with Reader() as reader:
            found = reader.tensor(checkpoint.tensors["model.layers.0.mlp.down_proj.weight"])
        assert torch.equal(found, llama()["blk.0.ffn_down.weight"])


ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen2moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "deepseek2": gguf.MODEL_ARCH.DEEPSEEK2,
    "gpt-oss": gguf.MODEL_ARCH.GPT_OSS,
    "mamba": gguf.MODEL_ARCH.MAMBA,
}


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_names_are_those_of_the_converter(architecture: str) -> None:
    """Our name for a tensor of the file is one that llama.cpp's converter gives this name in the file."""
    forward: Any = gguf.get_tensor_name_map(ARCHITECTURES[architecture], 2)
    of_architecture = {
        gguf.TENSOR_NAMES[kind].removeprefix("blk.{bid}.") for kind in gguf.MODEL_TENSORS[ARCHITECTURES[architecture]]
    }
    for module, ours in FAMILIES[architecture].names.items():
        if module not in of_architecture:
            continue
        top = ours.startswith(("model.", "backbone.")) or ours == "lm_head"
        name = ours if top else f"{FAMILIES[architecture].layers}1.{ours}".replace(".{}", "")
        assert forward.get_name(name) == (module if top else f"blk.1.{module}")
