"""Original checkpoints of Llama and Mistral: the names, order and pieces of their own programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merganser.checkpoint import Checkpoint, open_checkpoint
from merganser.engine.merge import merge, plan
from merganser.errors import CheckpointError
from tests.making import Tensors, make_recipe, read_model

HEADS, KV, HEAD, DIM, INNER, VOCAB = 4, 2, 8, 32, 48, 40
NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "feed_forward.gate",
    **{f"block_sparse_moe.experts.{i}.w{k}": f"feed_forward.experts.{i}.w{k}" for i in range(2) for k in (1, 2, 3)},
}
TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
LLAMA: dict[str, Any] = {
    "dim": DIM,
    "n_layers": 2,
    "n_heads": HEADS,
    "n_kv_heads": KV,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
MISTRAL: dict[str, Any] = {
    **LLAMA,
    "head_dim": HEAD,
    "hidden_dim": INNER,
    "vocab_size": VOCAB,
    "sliding_window": "4096",
}


def model(*, moe: bool = False, head: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    found = {"model.embed_tokens.weight": weight(VOCAB, DIM), "model.norm.weight": weight(DIM)}
    for layer in range(2):
        own = {
            "input_layernorm": weight(DIM),
            "self_attn.q_proj": weight(HEADS * HEAD, DIM),
            "self_attn.k_proj": weight(KV * HEAD, DIM),
            "self_attn.v_proj": weight(KV * HEAD, DIM),
            "self_attn.o_proj": weight(DIM, HEADS * HEAD),
            "post_attention_layernorm": weight(DIM),
        }
        if moe:
            own["block_sparse_moe.gate"] = weight(2, DIM)
            for i in range(2):
                own |= {f"block_sparse_moe.experts.{i}.w{k}": weight(INNER, DIM) for k in (1, 3)}
                own[f"block_sparse_moe.experts.{i}.w2"] = weight(DIM, INNER)
        else:
            own |= {"mlp.gate_proj": weight(INNER, DIM), "mlp.up_proj": weight(INNER, DIM)}
            own["mlp.down_proj"] = weight(DIM, INNER)
        found |= {f"model.layers.{layer}.{name}.weight": each for name, each in own.items()}
    return {**found, "lm_head.weight": weight(VOCAB, DIM)} if head else found


def original(tensors: Tensors) -> Tensors:
    """Names and order of rows of Meta's and Mistral's own programs."""
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        layer, _, rest = module.removeprefix("model.layers.").partition(".")
        if "q_proj" in name or "k_proj" in name:
            heads = tensor.shape[0] // HEAD
            tensor = torch.stack([tensor.view(heads, 2, -1, DIM)[:, k] for k in (0, 1)], 2).reshape(tensor.shape)
        found[f"{TOP[module]}.weight" if module in TOP else f"layers.{layer}.{NAMES[rest]}.weight"] = tensor
    return found


def cut(tensors: Tensors, parts: int, *, rows: bool) -> list[Tensors]:
    """Pieces as for several GPUs; Llama 3 cuts the rows of the embedding, Llama 2 its columns."""
    found: list[Tensors] = [{} for _ in range(parts)]
    for name, tensor in tensors.items():
        across = "attention.wo" in name or "w2" in name or ("tok_emb" in name and not rows)
        pieces = [tensor] * parts if tensor.dim() == 1 else tensor.chunk(parts, 1 if across else 0)
        for part, piece in zip(found, pieces, strict=True):
            part[name] = piece.contiguous().clone()
    return found


def put(folder: Path, parts: list[Tensors], params: Any = LLAMA, *, pth: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if params is not None:
        (folder / "params.json").write_text(params if isinstance(params, str) else json.dumps(params))
    for i, part in enumerate(parts):
        if pth:
            torch.save(part, folder / f"consolidated.{i:02d}.pth")
        else:
            save_file(part, folder / "consolidated.safetensors")
    return folder


def values(checkpoint: Checkpoint) -> Tensors:
    with checkpoint.reader() as reader:
        return {name: reader.tensor(tensor) for name, tensor in checkpoint.tensors.items()}


def check(checkpoint: Checkpoint, expected: Tensors) -> None:
    found = values(checkpoint)
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


@pytest.mark.parametrize(("parts", "rows"), [(1, True), (2, True), (2, False)])
def test_llama(tmp_path: Path, parts: int, rows: bool) -> None:
    own = {**original(model()), "rope.freqs": torch.ones(4)}
    folder = put(tmp_path / "m", cut(own, parts, rows=rows))
    checkpoint = open_checkpoint(str(folder))
    check(checkpoint, model())
    assert checkpoint.left_out == {"rope.freqs": "model code computes it"}


def test_merged_and_loaded_by_transformers(tmp_path: Path) -> None:
    """The same numbers as from the checkpoint of transformers, cut into blocks and read by rows."""
    transformers = pytest.importorskip("transformers")
    folder = put(tmp_path / "m", cut(original(model()), 2, rows=True))
    result = merge(make_recipe("linear", [folder], None, {"weight": 1}), tmp_path / "out")
    out = read_model(result.out)
    assert all(torch.equal(out[name], tensor) for name, tensor in model().items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(result.out)
    assert torch.equal(
        loaded.model.layers[1].self_attn.k_proj.weight, model()["model.layers.1.self_attn.k_proj.weight"]
    )
    notes = " ".join(result.record["warnings"])
    assert "config.json was made from it, with max_position_embeddings 4,096, which it does not say" in notes
    assert "has no tokenizer.json" in notes


def test_mistral(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", [original(model(head=False))], MISTRAL, pth=False)
    for reference in (folder, folder / "consolidated.safetensors"):
        checkpoint = open_checkpoint(str(reference))
        check(checkpoint, model(head=False))
        assert checkpoint.config == {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": DIM,
            "intermediate_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV,
            "head_dim": HEAD,
            "vocab_size": VOCAB,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
        }
    (folder / "params.json").unlink()
    assert open_checkpoint(str(folder)).tensors.keys() == original(model(head=False)).keys()


def test_mixtral_and_a_config_beside(tmp_path: Path) -> None:
    moe = {"num_experts": 2, "num_experts_per_tok": 1}
    folder = put(tmp_path / "m", [original(model(moe=True))], {**MISTRAL, "moe": moe, "max_seq_len": 64}, pth=False)
    checkpoint = open_checkpoint(str(folder))
    check(checkpoint, model(moe=True))
    assert (checkpoint.config["model_type"], checkpoint.config["num_local_experts"]) == ("mixtral", 2)
    assert len(checkpoint.notes) == 1
    plan(make_recipe("linear", [folder], None, {"weight": 1}))
    (folder / "config.json").write_text('{"model_type": "own"}')
    assert open_checkpoint(str(folder)).config == {"model_type": "own"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"max_position_embeddings": 4096}),
        ({"norm_eps": 1e-6}, {"max_position_embeddings": 2048}),
        ({"rope_theta": 1e6}, {"max_position_embeddings": 16384, "rope_theta": 1e6}),
        ({"rope_theta": 500000.0}, {"max_position_embeddings": 8192, "bos_token_id": 128000, "eos_token_id": 128001}),
        (
            {"rope_theta": 500000.0, "use_scaled_rope": True},
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
        ),
    ],
)
def test_configs_of_llamas(tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    found = open_checkpoint(str(put(tmp_path / "m", [original(model())], {**LLAMA, **changes}))).config
    assert {key: found[key] for key in expected} == expected
    assert found["model_type"] == "llama"


def without(name: str) -> Callable[[list[Tensors]], None]:
    def change(parts: list[Tensors]) -> None:
        del parts[1][name]

    return change


def with_(name: str, tensor: torch.Tensor, *, everywhere: bool = True) -> Callable[[list[Tensors]], None]:
    def change(parts: list[Tensors]) -> None:
        for part in parts if everywhere else parts[1:]:
            part[name] = tensor

    return change


def no_embedding(parts: list[Tensors]) -> None:
    for part in parts:
        del part["tok_embeddings.weight"]


BAD: dict[str, tuple[Any, Callable[[list[Tensors]], None] | None, str]] = {
    "no params": (None, None, "put its params.json beside them"),
    "not JSON": ("{", None, "params.json"),
    "no dim": ({"n_layers": 2}, None, "dim must be a whole number above 0, found None"),
    "heads": ({**LLAMA, "n_heads": 3}, None, "dim 32 is not a multiple of n_heads 3"),
    "heads of rows": ({**LLAMA, "n_heads": 8}, None, "n_kv_heads is 2 with heads of 4"),
    "kv": ({**LLAMA, "n_kv_heads": 4}, None, "n_kv_heads is 4 with heads of 8"),
    "kv kind": ({**LLAMA, "n_kv_heads": "4"}, None, "n_kv_heads must be a whole number"),
    "layers": ({**LLAMA, "n_layers": 3}, None, "n_layers is 3, and the files hold 2 layers"),
    "absurd layers": ({**LLAMA, "n_layers": (1 << 31) - 1}, None, "n_layers is 2147483647, and the files hold 2 layers"),
    "setting": ({**LLAMA, "q_lora_rank": 16}, None, "the setting 'q_lora_rank' is not known"),
    "theta": ({**LLAMA, "rope_theta": "x"}, None, "rope_theta must be a number above 0"),
    "window": ({**MISTRAL, "sliding_window": "x"}, None, "sliding_window must be a whole number"),
    "moe": ({**MISTRAL, "moe": 3}, None, "moe must give num_experts"),
    "dim": ({**LLAMA, "dim": 16, "head_dim": 8}, None, "dim is 16"),
    "tensor": (LLAMA, with_("vision_encoder.conv.weight", torch.ones(2, 2)), "'vision_encoder.conv.weight' is in no text"),
    "piece": (LLAMA, without("layers.0.attention.wv.weight"), "'layers.0.attention.wv.weight' is not in both"),
    "shape": (LLAMA, with_("layers.0.attention.wv.weight", torch.ones(3, 5), everywhere=False), "do not fit together"),
    "embedding": (LLAMA, no_embedding, "no tok_emb"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_malformed(tmp_path: Path, case: str) -> None:
    params, change, message = BAD[case]
    parts = cut(original(model()), 2, rows=True)
    if change is not None:
        change(parts)
    folder = put(tmp_path / "m", parts, params)
    with pytest.raises(CheckpointError) as found:
        merge(make_recipe("linear", [folder], None, {"weight": 1}), tmp_path / "out")
    assert message in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
