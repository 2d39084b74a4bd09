"""Recipes and models that no mixture can be built from: one message, exit code 2, nothing left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.cli.tiny import run
from tests.mixture.making import make_models, recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_models(tmp_path_factory.mktemp("models"), "llama")


def check(root: Path, content: dict[str, Any], wanted: str) -> None:
    file = root / "r.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    before = sorted(path.name for path in root.iterdir())
    found = run("mix", file, root / "out")
    assert (found.code, found.out) == (2, "")
    assert wanted in found.err
    assert found.err.count("error:") == 1
    assert sorted(path.name for path in root.iterdir()) == before


def _labelled(experts: list[dict[str, Any]]) -> bool:
    experts[0]["data"] = {"files": "a.txt", "labels": "sampled"}
    return True


def _prompts(found: dict[str, Any], *prompts: list[str]) -> dict[str, Any]:
    for entry, own in zip(found["experts"], prompts, strict=False):
        entry["positive_prompts"] = own
    return found | {"gate_mode": "hidden"}


Change = Callable[[dict[str, Any]], dict[str, Any]]

RECIPES: dict[str, tuple[Change, str]] = {
    "no experts": (lambda r: {"base_model": r["base_model"]}, "'experts' is missing"),
    "empty": (lambda r: r | {"experts": []}, "experts: the list is empty"),
    "no base": (lambda r: {"experts": r["experts"]}, "'base_model' is missing"),
    "a typo": (lambda r: r | {"gate_mod": "random"}, "unknown key 'gate_mod'. Did you mean 'gate_mode'?"),
    "a typo in an expert": (
        lambda r: r | {"experts": [{"source_model": "x", "positive_prompt": []}]},
        "unknown key 'positive_prompt'. Did you mean 'positive_prompts'?",
    ),
    "no model": (lambda r: r | {"experts": [{"positive_prompts": ["a"]}]}, "'source_model' is missing"),
    "gate mode": (lambda r: r | {"gate_mode": "hiden"}, "'hiden' is not known. Did you mean 'hidden'?"),
    "no prompts": (_prompts, "gate_mode hidden needs positive_prompts of each expert"),
    "prompts of one": (lambda r: _prompts(r, ["a"]), "gate_mode hidden needs positive_prompts of each expert"),
    "the same prompts": (lambda r: _prompts(r, ["a"], ["a"]), "all experts have the same prompts"),
    "too many per token": (lambda r: r | {"experts_per_token": 3}, "3 experts per token, and there are 2"),
    "none per token": (lambda r: r | {"experts_per_token": 0}, "expected a whole number of at least 1, got 0"),
    "architecture": (lambda r: r | {"architecture": "mixtrl"}, "'mixtrl' is not known. Did you mean 'mixtral'?"),
    "compressed attention": (lambda r: r | {"architecture": "deepseek_v3"}, "deepseek_v3 cannot be built from dense models: its attention compresses"),
    "another attention": (lambda r: r | {"architecture": "OLMoE"}, "OLMoE cannot be built from dense models: its attention normalises"),
    "other experts": (lambda r: r | {"architecture": "gpt-oss"}, "cannot be built from dense models: its attention has sinks"),
    "dense layers": (lambda r: r | {"dense_layers": 1}, "all layers of mixtral have experts; qwen3_moe and qwen2_moe and deepseek can have dense ones"),
    "all layers dense": (lambda r: r | {"architecture": "deepseek", "dense_layers": 4}, "4 layers would stay dense, and the base has 4"),
    "a fraction of layers": (lambda r: r | {"dense_layers": 0.5}, "dense_layers: expected a whole number"),
    "prompts without a gate": (
        lambda r: r | {"architecture": "deepseek", "shared_experts": [{"source_model": r["base_model"], "positive_prompts": ["a"]}]},
        "deepseek has no gate for its shared expert, so its prompts mean nothing",
    ),
    "no prompts of a gate": (
        lambda r: _prompts(r, ["a"], ["b"]) | {"architecture": "qwen2", "shared_experts": [{"source_model": r["base_model"]}]},
        "shared_experts[0].source_model: gate_mode hidden needs positive_prompts of each expert",
    ),
    "other family": (lambda r: r | {"architecture": "qwen3"}, "qwen3_moe is built from qwen3, and the base is of type 'llama'"),
    "no shared expert": (lambda r: r | {"architecture": "qwen"}, "qwen2_moe has a shared expert, which computes every token"),
    "shared expert": (
        lambda r: r | {"architecture": "mixtral", "shared_experts": [{"source_model": r["base_model"]}]},
        "mixtral has no shared expert",
    ),
    "two shared": (lambda r: r | {"shared_experts": [{"source_model": "x"}] * 2}, "one shared expert is possible, got 2"),
    "noise": (lambda r: r | {"experts": [{"source_model": "x", "noise_scale": -0.1}]}, "expected a number of at least 0, got -0.1"),
    "scale": (lambda r: r | {"experts": [{"source_model": "x", "residual_scale": "a"}]}, "expected a number, got 'a'"),
    "data with labels": (
        lambda r: _labelled(r["experts"]) and r,
        "experts[0].data: labels: routers are made without a loss; leave the key out",
    ),
    "ridge without data": (lambda r: r | {"gate_mode": "ridge"}, "gate_mode ridge needs text of each expert's domain"),
    "ridge": (lambda r: r | {"ridge": 0}, "expected a number above 0, got 0"),
    "no such model": (lambda r: r | {"experts": [{"source_model": "./none"}]}, "experts[0].source_model: model './none' not found"),
    "no such base": (lambda r: r | {"base_model": "./none"}, "base_model: model './none' not found"),
    "no such method": (lambda r: r | {"shared": {"merge_method": "linea"}}, "unknown merge method 'linea'. Did you mean 'linear'?"),
    "a method that is told nothing": (lambda r: r | {"shared": {}}, "'merge_method' is missing"),
    "dtype": (lambda r: r | {"dtype": "bf16"}, "Did you mean 'bfloat16'?"),
    "sidecars": (lambda r: r | {"shared": {"merge_method": "emr"}}, "emr keeps sidecars, which a mixture cannot"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(tmp_path: Path, models: list[Path], name: str) -> None:
    base, *experts = models
    change, wanted = RECIPES[name]
    check(tmp_path, change(recipe(base, experts)), wanted)


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return apply


def _config(**keys: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return apply


_UP = "model.layers.1.mlp.up_proj.weight"
EXPERTS = {
    "another shape": (_weights(lambda w: w.update({_UP: torch.ones(50, 32)})), f"{_UP} has the shape [50, 32], the base's has [48, 32]"),
    "a missing tensor": (_weights(lambda w: w.pop(_UP)), f"tensor {_UP!r} is missing; the base has it"),
    "a bias": (_weights(lambda w: w.update({"model.layers.1.mlp.up_proj.bias": torch.ones(48)})), "up_proj.bias is part of an MLP"),
    "depth": (_config(num_hidden_layers=3), "has num_hidden_layers 3, the base 4"),
    "activation": (_config(hidden_act="gelu"), "has hidden_act 'gelu', the base 'silu'"),
    "integers": (_weights(lambda w: w.update({_UP: torch.ones(48, 32, dtype=torch.int32)})), "holds int32, no floats"),
    "not finite": (_weights(lambda w: w[_UP].fill_(float("nan"))), "NaN or infinity"),
}  # fmt: skip
BASES = {
    "of an unknown kind": (_config(model_type="gpt2"), "no mixture can be built from models of type 'gpt2'"),
    "a missing layer": (_weights(lambda w: [w.pop(n) for n in list(w) if ".layers.3.mlp" in n]), "layer 3 of model.layers has no mlp.down_proj"),
    "a bias": (_weights(lambda w: w.update({"model.layers.1.mlp.up_proj.bias": torch.ones(48)})), "up_proj.bias is part of an MLP"),
    "biases": (_config(attention_bias=True), "the base has attention_bias, which mixtral cannot express"),
    "a missing projection": (_weights(lambda w: w.pop(_UP)), "layer 1 of model.layers has no mlp.up_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(tmp_path: Path, models: list[Path], name: str) -> None:
    change, wanted = EXPERTS[name]
    shutil.copytree(models[1], tmp_path / "bad")
    change(tmp_path / "bad")
    check(tmp_path, recipe(models[0], [models[2], tmp_path / "bad"]), wanted)


@pytest.mark.parametrize("name", BASES)
def test_bases(tmp_path: Path, models: list[Path], name: str) -> None:
    change, wanted = BASES[name]
    shutil.copytree(models[0], tmp_path / "bad")
    change(tmp_path / "bad")
    check(tmp_path, recipe(tmp_path / "bad", models[1:]), wanted)


def test_a_base_without_a_tokenizer(tmp_path: Path, models: list[Path]) -> None:
    shutil.copytree(models[0], tmp_path / "bad")
    for file in (tmp_path / "bad").glob("tokenizer*"):
        file.unlink()
    check(tmp_path, _prompts(recipe(tmp_path / "bad", models[1:]), ["a"], ["b"]), "has no tokenizer")


def test_other_recipes_are_sent_on(tmp_path: Path, models: list[Path]) -> None:
    content = {"merge_method": "linear", "models": [{"model": str(models[0])}]}
    check(tmp_path, content, "this recipe has a merge_method and no experts; merganser merge runs it")
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(recipe(models[0], models[1:])))
    found = run("merge", file, tmp_path / "out")
    assert found.code == 2
    assert "merganser mix runs it" in found.err


def test_what_is_printed(tmp_path: Path, models: list[Path]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe(models[0], models[1:])))
    found = run("mix", file, tmp_path / "out")
    assert found.code == 0, found.err
    lines = found.out.splitlines()
    assert lines[0].startswith("MixtralForCausalLM · 2 experts, 2 per token · ")
    assert lines[1] == "shared parts: passthrough; routers: random"
    assert "gate_mode random: the routers know nothing of the experts; train them" in found.err
    assert run("verify", tmp_path / "out").code == 0
