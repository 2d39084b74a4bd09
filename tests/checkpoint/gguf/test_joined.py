"""GGUF files of gpt-oss, DeepSeek and Mamba, whose converters join, cut and turn tensors: what they did is undone."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T

from merganser.checkpoint import Checkpoint, open_checkpoint
from merganser.engine.merge import plan
from merganser.errors import CheckpointError, RecipeError
from tests.checkpoint.gguf.making import Tensors, written
from tests.making import make_recipe

LAYER = "model.layers.0."


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def put(folder: Path, architecture: str, tensors: Tensors, kind: T = T.F32) -> Checkpoint:
    """Write tensors of a file, matrices as this type, and read them."""
    stored = {}
    for name, tensor in tensors.items():
        own = kind if tensor.dim() == 3 else T.F32
        stored[name] = (gguf.quants.quantize(tensor.numpy(), own), own)
    written(folder / "m.gguf", architecture, stored)
    (folder / "config.json").write_text(json.dumps({"model_type": "x"}))
    return open_checkpoint(str(folder))


def rounded(tensor: torch.Tensor, kind: T) -> torch.Tensor:
    data = gguf.quants.quantize(tensor.numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(data, kind).reshape(tensor.shape))


def check(checkpoint: Checkpoint, expected: Tensors) -> None:
    """Compare whole tensors, and ranges of bytes that begin and end anywhere."""
    assert checkpoint.tensors.keys() == expected.keys()
    with checkpoint.reader() as reader:
        for name, value in expected.items():
            info = checkpoint.tensors[name]
            assert info.shape == tuple(value.shape), name
            assert torch.equal(reader.tensor(info), value), name
            data = value.contiguous().reshape(-1).view(torch.uint8).numpy()
            for start, end in ((3, 41), (data.size // 3, data.size // 3 * 2 + 5), (data.size - 7, data.size)):
                start, end = min(start, data.size - 1), min(end, data.size)
                buffer = bytearray(end - start)
                reader.read_into(info, start, memoryview(buffer))
                assert bytes(buffer) == data[start:end].tobytes(), (name, start)


@pytest.mark.parametrize("kind", [T.F32, T.Q8_0, T.MXFP4])
def test_gpt_oss(tmp_path: Path, kind: T) -> None:
    experts, inputs, inner = 3, 64, 32
    gate, up = (weight(experts, inner, inputs, seed=seed) for seed in (1, 2))
    down = weight(experts, inputs, inner, seed=3)
    biases = {
        name: weight(experts, width, seed=4) for name, width in (("gate", inner), ("up", inner), ("down", inputs))
    }
    checkpoint = put(
        tmp_path,
        "gpt-oss",
        {
            "blk.0.post_attention_norm.weight": weight(inputs),
            "blk.0.attn_sinks.weight": weight(4),
            "blk.0.attn_q.bias": weight(8),
            "blk.0.ffn_gate_inp.weight": weight(experts, inputs),
            "blk.0.ffn_gate_inp.bias": weight(experts),
            "blk.0.ffn_up_exps.weight": up,
            "blk.0.ffn_gate_exps.weight": gate,
            "blk.0.ffn_down_exps.weight": down,
            **{f"blk.0.ffn_{name}_exps.bias": bias for name, bias in biases.items()},
        },
        kind,
    )
    both = torch.empty(experts, inputs, 2 * inner)
    both[:, :, ::2], both[:, :, 1::2] = rounded(gate, kind).mT, rounded(up, kind).mT
    both_biases = torch.empty(experts, 2 * inner)
    both_biases[:, ::2], both_biases[:, 1::2] = biases["gate"], biases["up"]
    check(
        checkpoint,
        {
            f"{LAYER}post_attention_layernorm.weight": weight(inputs),
            f"{LAYER}self_attn.sinks": weight(4),
            f"{LAYER}self_attn.q_proj.bias": weight(8),
            f"{LAYER}mlp.router.weight": weight(experts, inputs),
            f"{LAYER}mlp.router.bias": weight(experts),
            f"{LAYER}mlp.experts.gate_up_proj": both,
            f"{LAYER}mlp.experts.gate_up_proj_bias": both_biases,
            f"{LAYER}mlp.experts.down_proj": rounded(down, kind).mT.contiguous(),
            f"{LAYER}mlp.experts.down_proj_bias": biases["down"],
        },
    )
    with pytest.raises(RecipeError, match=r"'gpt-oss' can be read and not written\. Or leave 'gguf' out"):
        plan(make_recipe("passthrough", [tmp_path], gguf="F16"))


@pytest.mark.parametrize("kind", [T.F32, T.Q8_0])
def test_deepseek(tmp_path: Path, kind: T) -> None:
    heads, key, value, rank = 3, 32, 5, 64
    keys, values = weight(heads, rank, key, seed=1), weight(heads, value, rank, seed=2)
    names = {"attn_q_a": "q_a_proj", "attn_q_a_norm": "q_a_layernorm", "attn_q_b": "q_b_proj"}
    names |= {"attn_kv_a_mqa": "kv_a_proj_with_mqa", "attn_kv_a_norm": "kv_a_layernorm", "attn_output": "o_proj"}
    tensors = {
        "blk.0.attn_v_b.weight": values,
        "blk.0.attn_k_b.weight": keys,
        "blk.0.exp_probs_b.bias": weight(4),
        "blk.0.ffn_gate_inp.weight": weight(4, 8),
        "blk.0.ffn_down_shexp.weight": weight(8, 8),
        "blk.0.ffn_down_exps.weight": torch.stack([weight(8, 32, seed=5), weight(8, 32, seed=6)]),
        **{f"blk.0.{ours}.weight": weight(8) if "norm" in ours else weight(8, 8) for ours in names},
    }
    per_head = [torch.cat([rounded(keys, kind)[h].T, rounded(values, kind)[h]]) for h in range(heads)]
    expected = {
        f"{LAYER}self_attn.kv_b_proj.weight": torch.cat(per_head),
        f"{LAYER}mlp.gate.e_score_correction_bias": weight(4),
        f"{LAYER}mlp.gate.weight": weight(4, 8),
        f"{LAYER}mlp.shared_experts.down_proj.weight": weight(8, 8),
        **{f"{LAYER}mlp.experts.{i}.down_proj.weight": rounded(weight(8, 32, seed=5 + i), kind) for i in range(2)},
        **{f"{LAYER}self_attn.{hf}.weight": tensors[f"blk.0.{ours}.weight"] for ours, hf in names.items()},
    }
    check(put(tmp_path, "deepseek2", tensors, kind), expected)
    # files of a certain time hold the whole, too
    again = tmp_path / "again"
    again.mkdir()
    whole = put(again, "deepseek2", {**tensors, "blk.0.attn_kv_b.weight": weight(7, 8)}, kind)
    check(whole, {**expected, f"{LAYER}self_attn.kv_b_proj.weight": weight(7, 8)})
    assert set(whole.left_out) == {"blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"}


def test_mamba(tmp_path: Path) -> None:
    inner, state = 8, 4
    logs = weight(inner, state)
    names = {"ssm_in": "in_proj", "ssm_x": "x_proj", "ssm_dt": "dt_proj", "ssm_out": "out_proj"}
    stored = {
        "token_embd.weight": weight(16, 4),
        "output_norm.weight": weight(4),
        "blk.0.attn_norm.weight": weight(4),
        "blk.0.ssm_a": -logs.exp(),
        "blk.0.ssm_d": weight(inner),
        "blk.0.ssm_conv1d.weight": weight(inner, 4),
        "blk.0.ssm_conv1d.bias": weight(inner),
        "blk.0.ssm_dt.bias": weight(inner, seed=2),
        **{f"blk.0.{ours}.weight": weight(inner, 4, seed=3) for ours in names},
    }
    mixer = "backbone.layers.0.mixer."
    checkpoint = put(tmp_path, "mamba", stored)
    check(
        checkpoint,
        {
            "backbone.embeddings.weight": weight(16, 4),
            "backbone.norm_f.weight": weight(4),
            "backbone.layers.0.norm.weight": weight(4),
            f"{mixer}A_log": torch.from_numpy(np.log(logs.exp().double().numpy())).float(),
            f"{mixer}D": weight(inner),
            f"{mixer}conv1d.weight": weight(inner, 1, 4),
            f"{mixer}conv1d.bias": weight(inner),
            f"{mixer}dt_proj.bias": weight(inner, seed=2),
            **{f"{mixer}{hf}.weight": weight(inner, 4, seed=3) for hf in names.values()},
        },
    )


@pytest.mark.parametrize(
    ("architecture", "tensors", "message"),
    [
        ("gpt-oss", {"blk.0.ffn_gate_exps.weight": weight(2, 4, 8)}, "is there without blk.0.ffn_up_exps.weight"),
        ("gpt-oss", {"blk.0.ffn_up_exps.weight": weight(2, 4, 8)}, "has no such tensor"),
        ("gpt-oss", {"blk.0.ffn_down_exps.weight": weight(4, 8)}, "does not fit the others of its layer"),
        (
            "gpt-oss",
            {"blk.0.ffn_gate_exps.weight": weight(2, 4, 8), "blk.0.ffn_up_exps.weight": weight(2, 5, 8)},
            "does not fit the others of its layer",
        ),
        ("deepseek2", {"blk.0.attn_k_b.weight": weight(2, 4, 8)}, "is there without blk.0.attn_v_b.weight"),
        (
            "deepseek2",
            {"blk.0.attn_k_b.weight": weight(2, 4, 8), "blk.0.attn_v_b.weight": weight(2, 5, 8)},
            "does not fit the others of its layer",
        ),
        ("deepseek2", {"blk.0.nextn.eh_proj.weight": weight(4, 8)}, "has no such tensor"),
        ("mamba", {"blk.0.ssm_norm.weight": weight(4)}, "has no such tensor"),
    ],
)
def test_malformed(tmp_path: Path, architecture: str, tensors: Tensors, message: str) -> None:
    with pytest.raises(CheckpointError) as found:
        put(tmp_path, architecture, tensors)
    assert message in str(found.value)
