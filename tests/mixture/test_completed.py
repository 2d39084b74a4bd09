"""What every published checkpoint of an architecture has, and a dense model may lack: vLLM and llama.cpp expect it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.errors import CheckpointError, MergeError
from merganser.mixture import mix
from tests.making import read_json
from tests.mixture.making import LAYERS, logits, make_models, recipe


def change(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
    """Change tensors and settings of a model."""
    if tensors:
        held = load_file(folder / "model.safetensors")
        save_file(held | tensors, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def test_qwen2_moe_has_biases_of_queries_keys_and_values(tmp_path: Path) -> None:
    base, *experts = make_models(tmp_path, "llama")
    shared = {"shared_experts": [{"source_model": str(base)}]}
    out = mix(recipe(base, experts, **shared), tmp_path / "out").out
    weights = load_file(out / "model.safetensors")
    biases = {name: each for name, each in weights.items() if name.endswith(".bias")}
    assert set(biases) == {f"model.layers.{n}.self_attn.{kind}_proj.bias" for n in range(LAYERS) for kind in "qkv"}
    assert not any(each.any() for each in biases.values())
    assert {len(each) for name, each in biases.items() if "k_proj" in name} == {16}
    assert read_json(out, "config.json")["qkv_bias"]
    # those of a model that has some are kept
    qwen, *others = make_models(tmp_path / "qwen", "qwen2")
    kept = mix(recipe(qwen, others, shared_experts=[{"source_model": str(qwen)}]), tmp_path / "kept").out
    name = "model.layers.1.self_attn.k_proj.bias"
    theirs = load_file(qwen / "model.safetensors")[name]
    assert theirs.any()
    assert torch.equal(load_file(kept / "model.safetensors")[name], theirs)


def test_deepseek_has_a_head_and_settings_that_its_own_code_reads(tmp_path: Path) -> None:
    models = make_models(tmp_path, "llama-tied")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    for folder in models:
        change(folder, rope_parameters=scaled)
    base, *experts = models
    averaged = {"merge_method": "linear", "parameters": {"weight": 1}}
    out = mix(recipe(base, experts, architecture="deepseek", shared=averaged), tmp_path / "out").out
    weights, config = load_file(out / "model.safetensors"), read_json(out, "config.json")
    one, two = (load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in experts)
    torch.testing.assert_close(weights["lm_head.weight"], (one + two) / 2)
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == {"type": "linear", "factor": 2.0}
    # other architectures stay tied, as their classes can be
    tied = mix(recipe(base, experts), tmp_path / "tied").out
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    assert read_json(tied, "config.json")["tie_word_embeddings"] is True
    assert logits(tied).isfinite().all()


@pytest.mark.parametrize("wrong", ["biases of outputs", "heads of another size", "contributors of other rotations"])
def test_what_an_architecture_cannot_hold_is_refused(tmp_path: Path, wrong: str) -> None:
    models = make_models(tmp_path, "olmo2" if wrong.startswith("contributors") else "llama")
    base, *experts = models
    kind: type[MergeError] = MergeError
    if wrong == "biases of outputs":
        for folder in models:
            sizes = {"q": 32, "k": 16, "v": 16, "o": 32}
            own = [f"model.layers.{n}.self_attn" for n in range(LAYERS)]
            biases = {f"{name}.{kind}_proj.bias": torch.ones(size) for name in own for kind, size in sizes.items()}
            change(folder, biases, attention_bias=True)
        asked = recipe(base, experts, shared_experts=[{"source_model": str(base)}])
        message = r"has model\.layers\.0\.self_attn\.o_proj\.bias, and qwen2_moe has biases of queries, keys and values"
    elif wrong == "heads of another size":
        for folder in models:
            wide = {"q_proj": (128, 32), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (32, 128)}
            own = [f"model.layers.{n}.self_attn" for n in range(LAYERS)]
            change(
                folder,
                {f"{name}.{part}.weight": torch.ones(shape) for name in own for part, shape in wide.items()},
                head_dim=32,
            )
        asked = recipe(base, experts, architecture="deepseek")
        message = "4 heads of 32 in a model of 32, which deepseek cannot express"
    else:
        first, second = (mix(recipe(base, [base, one]), tmp_path / f"c{n}").out for n, one in enumerate(experts))
        change(second, rope_parameters={"rope_type": "default", "rope_theta": 5.0})
        asked = {"join": [{"source_model": str(first)}, {"source_model": str(second)}]}
        kind, message = CheckpointError, r"has rope_theta 5.0, .* 10000.0"
    with pytest.raises(kind, match=message):
        mix(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
