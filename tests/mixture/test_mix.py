"""Mixtures of tiny models: their laws, their names and configs, their routers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merganser.errors import CheckpointError
from merganser.files import sha256_of_file
from merganser.mixture import mix
from tests.calibration.families import FAMILIES as FAMILIES_OF_MODELS
from tests.calibration.families import _config
from tests.evaluation.tiny import add_tokenizer
from tests.making import read_model
from tests.mixture.making import LAYERS, logits, make_models, recipe

FAMILIES = {
    "llama": "MixtralForCausalLM",
    "llama-tied": "MixtralForCausalLM",
    "mistral": "MixtralForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
    "olmo2": "FlexOlmoForCausalLM",
}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_models(tmp_path_factory.mktemp("llamas"), "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_that_models_mlp_on_the_bases_attention(tmp_path: Path, family: str) -> None:
    base, expert = make_models(tmp_path, family, 2)
    out = mix(recipe(base, [expert]), tmp_path / "out").out
    weights, theirs = load_file(base / "model.safetensors"), load_file(expert / "model.safetensors")
    weights |= {name: each for name, each in theirs.items() if ".mlp." in name}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    found = logits(out, experts_implementation="eager")
    torch.testing.assert_close(found, logits(base))
    # transformers multiplies by an expert's gate and up projections at once, which rounds differently
    assert torch.equal(found, logits(base, together=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_identical_experts_compute_what_the_base_does(tmp_path: Path, family: str) -> None:
    [base] = make_models(tmp_path, family, 1)
    result = mix(recipe(base, [base] * 4, experts_per_token=3), tmp_path / "out")
    torch.testing.assert_close(logits(result.out), logits(base), rtol=1e-4, atol=1e-4)
    assert any("all experts are" in warning for warning in result.record["warnings"])


@pytest.mark.parametrize(
    ("family", "shared"), [*((family, False) for family in FAMILIES), ("llama", True), ("qwen2", True)]
)
def test_names_and_config_are_those_of_transformers(tmp_path: Path, family: str, shared: bool) -> None:
    base, *experts = make_models(tmp_path, family)
    keys: dict[str, Any] = {"shared_experts": [{"source_model": str(base)}]} if shared else {}
    out = mix(recipe(base, experts, **keys), tmp_path / "out").out
    kind = "Qwen2MoeForCausalLM" if shared else FAMILIES[family]
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.architectures == [kind]
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "theirs")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", out))
    assert {name: each.shape for name, each in ours.items()} == {name: each.shape for name, each in theirs.items()}
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    # published checkpoints say num_experts; this release of transformers writes its other name
    written["num_experts"] = written.get("num_experts", written.get("num_local_experts"))
    own = json.loads((out / "config.json").read_text())
    # which transformers 5 reads, and no longer writes
    assert own.pop("rope_theta") == written["rope_parameters"]["rope_theta"]
    assert own == {key: written.get(key) for key in own} | {"transformers_version": own["transformers_version"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(torch.tensor([[5, 9]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_windows_of_attention_are_kept(tmp_path: Path, family: str) -> None:
    """In the layers that had them, also where config.json does not name these; the text is longer than a window."""
    [base] = make_models(tmp_path, family, 1)
    file = base / "config.json"
    config = json.loads(file.read_text())
    config.pop("layer_types", None)
    file.write_text(json.dumps(config))
    shared = [{"source_model": str(base), "residual_scale": 0.0}]
    out = mix(recipe(base, [base] * 2, shared_experts=shared), tmp_path / "out").out
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2_moe"
    torch.testing.assert_close(logits(out), logits(base), rtol=1e-4, atol=1e-4)
    if family == "mistral":
        result = mix(recipe(base, [base] * 2, architecture="deepseek"), tmp_path / "without")
        assert "deepseek has no sliding windows, and the base's layers see 5 tokens" in " ".join(
            result.record["warnings"]
        )
        assert json.loads((result.out / "config.json").read_text())["sliding_window"] is None


def test_an_expert_that_leaves_out_a_default(tmp_path: Path) -> None:
    base, *experts = make_models(tmp_path, "llama")
    config = json.loads((experts[0] / "config.json").read_text())
    assert config.pop("hidden_act") == "silu"
    (experts[0] / "config.json").write_text(json.dumps(config))
    assert mix(recipe(base, experts), tmp_path / "out").record["mixture"]["experts_per_token"] == 2


def test_other_sizes_of_heads_are_said(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES_OF_MODELS, "llama-heads", (_config("Llama", head_dim=16), "LlamaForCausalLM"))
        [base] = make_models(tmp_path, "llama-heads", 1)
    result = mix(recipe(base, [base] * 2, shared_experts=[{"source_model": str(base)}]), tmp_path / "out")
    assert any("transformers loads such a qwen2_moe, vLLM does not" in each for each in result.record["warnings"])


def _asked(base: Path, experts: list[Path], **keys: Any) -> dict[str, Any]:
    found = recipe(base, experts, gate_mode="hidden", **keys)
    for prompt, entry in zip(["red green", "one two"], found["experts"], strict=True):
        entry["positive_prompts"] = [prompt]
    return found


ASKED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a name that mergekit-moe shares": ("qwen3", {"architecture": "qwen"}, "qwen3_moe"),
    "a shared expert without prompts": ("llama", {"shared_experts": [{}]}, "deepseek"),
    "a shared expert with prompts": ("llama", {"shared_experts": [{"positive_prompts": ["red"]}]}, "qwen2_moe"),
    "a shared expert, random": ("llama", {"shared_experts": [{}], "gate_mode": "random"}, "qwen2_moe"),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_architecture_that_mergekit_moe_takes(tmp_path: Path, name: str) -> None:
    family, keys, wanted = ASKED[name]
    base, *experts = make_models(tmp_path, family)
    shared = [{"source_model": str(base)} | each for each in keys.get("shared_experts", [])]
    written = _asked(base, experts) | keys | ({"shared_experts": shared} if shared else {})
    config = json.loads((mix(written, tmp_path / "out").out / "config.json").read_text())
    assert (config["model_type"], config["num_experts_per_tok"]) == (wanted, 2)


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_an_empty_prompt_is_the_token_that_begins_texts(tmp_path: Path, mode: str) -> None:
    base, *experts = make_models(tmp_path, "llama")
    add_tokenizer(base, bos=True)
    written = _asked(base, experts) | {"gate_mode": mode}
    written["experts"][1] |= {"positive_prompts": [""], "negative_prompts": ["red green"]}
    weights = read_model(mix(written, tmp_path / "out").out)
    if mode == "cheap_embed":
        table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        negative = table[transformers.AutoTokenizer.from_pretrained(base)("red green")["input_ids"]].sum(0)
        row = table[0] / table[0].norm() - negative / negative.norm()
        found = weights["model.layers.1.block_sparse_moe.gate.weight"][1]
        torch.testing.assert_close(found, row / row.norm(), rtol=1e-5, atol=1e-6)
    add_tokenizer(base)
    with pytest.raises(CheckpointError, match="the tokenizer gives no token for the prompt"):
        mix(written, tmp_path / "none")


def test_a_shared_expert_beside_ridge_routers(tmp_path: Path) -> None:
    """Its gate cannot be made from text: zeros, so it counts half."""
    base, *experts = make_models(tmp_path, "qwen2")
    written = recipe(base, experts, shared_experts=[{"source_model": str(base)}])
    del written["gate_mode"]
    for number, entry in enumerate(written["experts"]):
        (tmp_path / f"{number}.txt").write_text(["red green blue ", "one two three four "][number] * 40)
        entry["data"] = {"files": str(tmp_path / f"{number}.txt"), "length": 24, "sequences": 9}
    result = mix(written, tmp_path / "out")
    gate = read_model(result.out)["model.layers.0.mlp.shared_expert_gate.weight"]
    assert gate.shape == (1, 32)
    assert not gate.any()
    assert any("the expert counts half for every token" in each for each in result.record["warnings"])


def test_experts_are_copied_and_everything_else_is_merged(tmp_path: Path, llamas: list[Path]) -> None:
    base, *experts = llamas
    shared = {"merge_method": "linear", "parameters": {"weight": 1}}
    result = mix(recipe(base, experts, shared=shared, random_seed=3), tmp_path / "out")
    merged = read_model(result.out)
    one, two = (load_file(expert / "model.safetensors") for expert in experts)
    for name, found in merged.items():
        if "gate.weight" in name:
            assert found.shape == (2, 32)
        elif "experts" not in name:
            torch.testing.assert_close(found, (one[name] + two[name]) / 2)
    for kind, own in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        for number, expert in enumerate((one, two)):
            name = f"model.layers.1.block_sparse_moe.experts.{number}.{kind}.weight"
            assert torch.equal(merged[name], expert[f"model.layers.1.mlp.{own}.weight"])
    again = mix(recipe(base, experts, shared=shared, random_seed=4), tmp_path / "again")
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert not torch.equal(read_model(again.out)[router], merged[router])
    assert result.record["mixture"]["experts"] == [str(expert) for expert in experts]
    assert result.record["census"][0]["left_out"][0]["reason"] == "the shared parts come from other inputs"


def test_ties_merges_the_shared_parts(tmp_path: Path, llamas: list[Path]) -> None:
    from merganser.engine.merge import merge

    base, *experts = llamas
    ties = {"merge_method": "ties", "parameters": {"density": 0.5, "weight": 1}}
    merged = read_model(mix(recipe(base, experts, shared=ties), tmp_path / "out").out)
    models = [{"model": str(expert)} for expert in experts]
    dense = read_model(merge({**ties, "base_model": str(base), "models": models}, tmp_path / "dense").out)
    assert all(torch.equal(merged[name], each) for name, each in dense.items() if ".mlp." not in name)


def test_the_residual_scale(tmp_path: Path, llamas: list[Path]) -> None:
    base, expert, _ = llamas
    keys = {"experts": [{"source_model": str(expert), "residual_scale": 0.25}]}
    merged, theirs = (
        read_model(mix(recipe(base, []) | keys, tmp_path / "out").out),
        load_file(expert / "model.safetensors"),
    )
    layer = "model.layers.2"
    assert torch.equal(
        merged[f"{layer}.block_sparse_moe.experts.0.w2.weight"], theirs[f"{layer}.mlp.down_proj.weight"] / 4
    )
    assert torch.equal(merged[f"{layer}.block_sparse_moe.experts.0.w1.weight"], theirs[f"{layer}.mlp.gate_proj.weight"])


def prompted(base: Path, experts: list[Path], mode: str) -> dict[str, Any]:
    found = recipe(base, experts, gate_mode=mode)
    prompts = ["red green blue", "one two three four"]
    for entry, prompt in zip(found["experts"], prompts, strict=True):
        entry |= {"positive_prompts": [prompt, prompt[:7]], "negative_prompts": ["zero"]}
    return found


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_routers_from_prompts_read_what_routers_read(tmp_path: Path, llamas: list[Path], mode: str) -> None:
    base, *experts = llamas
    out = mix(prompted(base, experts, mode), tmp_path / "out").out
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda _, __, out: seen.append(out[0]))

    def vectors(prompt: str) -> torch.Tensor:
        seen.clear()
        model(torch.tensor([tokenizer(prompt)["input_ids"]]))
        return torch.stack([rows.mean(0) if mode == "hidden_avg" else rows[-1] for rows in seen]).detach()

    merged = read_model(out)
    for row, prompt in enumerate(["red green blue", "one two three four"]):
        wanted = (vectors(prompt) + vectors(prompt[:7])) / 2 - vectors("zero")
        for layer in range(LAYERS):
            found = merged[f"model.layers.{layer}.block_sparse_moe.gate.weight"][row]
            torch.testing.assert_close(found, wanted[layer] / wanted[layer].norm(), rtol=1e-4, atol=1e-5)


def test_cheap_routers(tmp_path: Path, llamas: list[Path]) -> None:
    base, *experts = llamas
    merged = read_model(mix(prompted(base, experts, "cheap_embed"), tmp_path / "out").out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    ids = [tokenizer(text)["input_ids"] for text in ("red green blue", "red gre", "zero")]
    # as mergekit-moe: sums at length 1, of positive and negative prompts each
    positive, negative = table[ids[0] + ids[1]].sum(0), table[ids[2]].sum(0)
    wanted = positive / positive.norm() - negative / negative.norm()
    for layer in range(LAYERS):
        found = merged[f"model.layers.{layer}.block_sparse_moe.gate.weight"][0]
        torch.testing.assert_close(found, wanted / wanted.norm(), rtol=1e-5, atol=1e-6)


def test_ridge_routers(tmp_path: Path, llamas: list[Path]) -> None:
    base, *experts = llamas
    texts = ["red green blue " * 90, "one two three four " * 70]
    found = recipe(base, experts, ridge=0.05)
    del found["gate_mode"]
    for number, entry in enumerate(found["experts"]):
        file = tmp_path / f"{number}.txt"
        file.write_text(texts[number])
        entry["data"] = {"files": str(file), "length": 24, "sequences": 17}
    result = mix(found, tmp_path / "out")
    mixture = result.record["mixture"]
    assert (mixture["gate_mode"], mixture["experts_per_token"]) == ("ridge", 1)
    assert mixture["router"]["tried_on"] == "held-out tokens of each domain"
    assert mixture["router"]["right"] > 0.9
    # the mixture itself: its router, on what it reads, sends each domain to its expert
    model = transformers.AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for expert, text in enumerate(texts):
        chosen: list[torch.Tensor] = []
        handles = [
            layer.mlp.gate.register_forward_hook(lambda _, __, out, to=chosen: to.append(out[2]))
            for layer in model.model.layers
        ]
        model(torch.tensor([tokenizer(text)["input_ids"][:24]]))
        assert (torch.cat(chosen) == expert).double().mean() > 0.8
        for handle in handles:
            handle.remove()


def test_a_ridge_router_by_hand() -> None:
    from merganser.mixture.fitted import ridge_rows

    draw = torch.Generator().manual_seed(0)
    domains = [torch.randn(40, 6, generator=draw, dtype=torch.float64) + k for k in range(3)]
    gram = sum(x.T @ x / 40 for x in domains)
    assert isinstance(gram, torch.Tensor)
    found = ridge_rows(gram, torch.stack([x.mean(0) for x in domains]), 0.1)
    x, y = torch.cat(domains), torch.eye(3, dtype=torch.float64).repeat_interleave(40, 0)
    regular = 0.1 * gram.diagonal().mean() * 40 * torch.eye(6, dtype=torch.float64)
    wanted = torch.linalg.solve(x.T @ x + regular, x.T @ y).T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_second_run_continues_or_refuses(tmp_path: Path, llamas: list[Path]) -> None:
    from merganser.errors import OutputError

    base, *experts = llamas
    mix(recipe(base, experts), tmp_path / "out")
    with pytest.raises(OutputError):
        mix(recipe(base, experts), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    mix(recipe(base, experts), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def deepseek_logits(folder: Path, base: Path) -> torch.Tensor:
    """The base with the experts of a DeepSeek mixture in its layers, from the definition of DeepSeek-MoE."""
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (weights[f"{name}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def layer(number: int, x: torch.Tensor) -> torch.Tensor:
        name = f"model.layers.{number}.mlp"
        if number < config["first_k_dense_replace"]:
            return mlp(name, x)
        scores = (x @ weights[f"{name}.gate.weight"].T).softmax(-1)
        top = scores.topk(config["num_experts_per_tok"])
        gates = torch.zeros_like(scores).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
        found = sum(
            gates[..., expert, None] * mlp(f"{name}.experts.{expert}", x)
            for expert in range(config["n_routed_experts"])
        )
        assert isinstance(found, torch.Tensor)
        return found + mlp(f"{name}.shared_experts", x) if config["n_shared_experts"] else found

    for number, own in enumerate(model.model.layers):
        own.mlp.forward = lambda x, number=number: layer(number, x)
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[5, 9, 100, 33, 7, 250, 11]])).logits
    return found


@pytest.mark.parametrize("dense_layers", [0, 2])
def test_deepseek(tmp_path: Path, llamas: list[Path], dense_layers: int) -> None:
    """Names and keys are those that mergekit-moe writes, and of deepseek-moe-16b-base."""
    base, *experts = llamas
    keys = {"architecture": "DeepSeek", "dense_layers": dense_layers}
    result = mix(recipe(base, [base] * 3, **keys), tmp_path / "out")
    torch.testing.assert_close(deepseek_logits(result.out, base), logits(base), rtol=1e-4, atol=1e-4)
    assert any("transformers has no class for the architecture deepseek" in each for each in result.record["warnings"])
    shared = {"shared_experts": [{"source_model": str(experts[0])}]}
    out = mix(recipe(base, experts, **keys, **shared), tmp_path / "shared").out
    config, weights = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    wanted = {
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": dense_layers,
    }
    wanted |= {"moe_intermediate_size": 48, "moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": True}
    assert {key: config[key] for key in wanted} == wanted
    theirs = load_file(experts[0] / "model.safetensors")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp"
        found = {own.removeprefix(f"{name}.") for own in weights if own.startswith(name)}
        kinds = [f"{kind}_proj.weight" for kind in ("gate", "up", "down")]
        if layer < dense_layers:
            assert found == set(kinds)
            continue
        modules = ("shared_experts", "experts.0", "experts.1")
        assert found == {"gate.weight", *(f"{module}.{kind}" for module in modules for kind in kinds)}
        assert torch.equal(weights[f"{name}.shared_experts.up_proj.weight"], theirs[f"{name}.up_proj.weight"])


@pytest.mark.parametrize("mode", ["hidden", "ridge"])
def test_first_layers_may_stay_dense(tmp_path: Path, mode: str) -> None:
    """They are what the shared parts are; routers of the others are what they are without them, as far as these read alike."""
    base, *experts = make_models(tmp_path, "qwen3", 3)
    if mode == "hidden":
        written = prompted(base, experts, "hidden")
    else:
        written = recipe(base, experts, gate_mode="ridge")
        for number, entry in enumerate(written["experts"]):
            (tmp_path / f"{number}.txt").write_text(["red green blue ", "one two three four "][number] * 40)
            entry["data"] = {"files": str(tmp_path / f"{number}.txt"), "length": 24, "sequences": 9}
    found = mix(written | {"dense_layers": 2}, tmp_path / "out")
    weights, dense = load_file(found.out / "model.safetensors"), load_file(base / "model.safetensors")
    assert json.loads((found.out / "config.json").read_text())["mlp_only_layers"] == [0, 1]
    for name, each in dense.items():
        if "layers.0." in name or "layers.1." in name:
            assert torch.equal(weights[name], each)
    layers = found.record["mixture"]["router"]["layers"]
    assert (len(layers), found.record["mixture"]["router"]["worst_layer"] in (2, 3)) == (2, True)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(found.out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    whole = load_file(mix(written, tmp_path / "whole").out / "model.safetensors")
    for layer in (2, 3):
        name = f"model.layers.{layer}.mlp.gate.weight"
        # prompts pass through the base; text of a domain through its expert, which is not in the dense layers now
        assert torch.equal(weights[name], whole[name]) == (mode == "hidden")


def test_noise_on_an_expert(tmp_path: Path, llamas: list[Path]) -> None:
    base, expert, other = llamas

    def mixed(name: str, **keys: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        written = recipe(base, [expert, other], **keys)
        written["experts"][0] |= {"noise_scale": 0.5, "residual_scale": 2.0}
        found = mix(written, tmp_path / name)
        return found, load_file(found.out / "model.safetensors")

    result, found = mixed("out")
    theirs = load_file(expert / "model.safetensors")
    for own, kind, scale in (("w1", "gate_proj", 1), ("w3", "up_proj", 1), ("w2", "down_proj", 2)):
        name = f"model.layers.1.block_sparse_moe.experts.{{}}.{own}.weight"
        added = found[name.format(0)] / scale - theirs[f"model.layers.1.mlp.{kind}.weight"]
        assert abs(float(added.std()) - 0.5) < 0.05
        assert abs(float(added.mean())) < 0.05
        # rows and tensors differ
        assert len({float(value) for value in added[:, 0]}) == len(added)
        plain = load_file(other / "model.safetensors")[f"model.layers.1.mlp.{kind}.weight"]
        assert torch.equal(found[name.format(1)], plain)
    _, repeated = mixed("again")
    assert all(torch.equal(each, repeated[name]) for name, each in found.items())
    _, seeded = mixed("seeded", random_seed=1)
    name = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    assert not torch.equal(seeded[name], found[name])
    assert not any("MLP" in each["reason"] for each in result.record["census"][1]["left_out"])


def test_an_old_output_is_read_once_before_it_is_replaced(
    tmp_path: Path, llamas: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at before routers are made, and again when it is replaced; hashes of what did not change are known then."""
    base, *experts = llamas
    out = mix(recipe(base, experts), tmp_path / "out").out
    read: Counter[str] = Counter()

    def counted(path: Path) -> str:
        read[path.name] += 1
        return sha256_of_file(path)

    monkeypatch.setattr("merganser.engine.output.ownership.sha256_of_file", counted)
    mix(recipe(base, experts, random_seed=1), out, overwrite=True)
    assert set(read.values()) == {1}
    assert "config.json" in read
    assert any(name.endswith(".safetensors") for name in read)
    # what is written anew is another file, whatever its name
    mix(recipe(base, experts), out, overwrite=True)
    assert read["config.json"] == 2
