"""Smaller mixtures: the methods against references, their laws, layouts of checkpoints, and bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merganser.anatomy.settings.mixtures import CHOSEN, COUNTS
from merganser.errors import CheckpointError, UnsupportedError
from merganser.mixture import mix
from merganser.mixture.shrinking import METHODS, run, shrink
from merganser.mixture.shrinking.experts import Experts, Observed
from merganser.mixture.shrinking.grouping import by_centres
from merganser.mixture.shrinking.layers import _per_expert
from merganser.mixture.shrinking.method import aligned
from tests.calibration.families import FAMILIES, _config, save
from tests.cli.tiny import run as command
from tests.evaluation.tiny import add_tokenizer, text
from tests.mixture.making import logits
from tests.reference import shrinking as reference

OLMOE = (_config("Olmoe", num_experts_per_tok=2, num_experts=4), "OlmoeForCausalLM")
MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss"]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny mixture of each family, and a text."""
    root = tmp_path_factory.mktemp("mixtures")
    (root / "text.txt").write_text(text(1, 120), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "olmoe", OLMOE)
        found = {family: save(root / family, family) for family in MIXTURES}
    for folder in found.values():
        add_tokenizer(folder)
    return {**found, "text": root / "text.txt"}


def shrunk(made: dict[str, Path], family: str | Path, out: Path, **options: Any) -> Any:
    model = made[family] if isinstance(family, str) else family
    return shrink(model, [str(made["text"])], out, **{"sequences": 2, "length": 24, **options})


def changed(folder: Path, to: Path, change: Callable[[Weights], Any]) -> Path:
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file({name: each.contiguous() for name, each in weights.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def experts(seed: int, count: int, units: int, width: int) -> Experts:
    draw = torch.Generator().manual_seed(seed)
    parts = {name: torch.randn(count, units, width, generator=draw) for name in ("gate", "up", "down")}
    return Experts(parts, None, lambda gate, up: torch.nn.functional.silu(gate) * up)


def observed(seed: int, count: int, width: int, tokens: int) -> tuple[Observed, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs, router = torch.randn(tokens, width, generator=draw), torch.randn(count, width, generator=draw)
    logits = inputs @ router.T
    chosen = torch.zeros(tokens, count, dtype=torch.bool).scatter_(1, logits.topk(2).indices, True)
    return Observed(inputs, logits, logits.softmax(1) * chosen, chosen), router


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_methods_against_the_reference(method: str, seed: int) -> None:
    own = experts(seed, 6, 4, 5)
    seen, router = observed(seed + 10, 6, 5, 40)
    found = METHODS[method].reduce(own, seen, 3)
    wide = {name: part.double().numpy() for name, part in own.units.items()}
    theirs = [{"gate": wide["gate"][e], "up": wide["up"][e], "down": wide["down"][e].T} for e in range(6)]
    facts = {"x": seen.inputs, "logits": seen.logits, "gates": seen.gates}
    facts = {name: each.double().numpy() for name, each in facts.items()} | {"chosen": seen.chosen.numpy()}
    groups, merged, rows = getattr(reference, method)(theirs, facts, router.double().numpy(), 3)
    assert found.groups == groups
    for name in ("gate", "up", "down"):
        wanted = np.stack([each[name].T if name == "down" else each[name] for each in merged])
        np.testing.assert_allclose(found.experts.units[name].numpy(), wanted, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(found.router.numpy() @ router.double().numpy(), rows, rtol=1e-6)


def test_an_expert_computes_the_same_after_its_units_are_aligned() -> None:
    own = experts(3, 3, 6, 4)
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    moved = aligned(own)
    assert not torch.equal(moved.units["gate"], own.units["gate"])
    for expert in range(3):
        torch.testing.assert_close(moved.outputs(expert, inputs), own.outputs(expert, inputs))


def test_experts_without_tokens_are_merged_in_equal_parts() -> None:
    own = experts(3, 4, 6, 4)
    seen, _ = observed(5, 4, 4, 8)
    idle = Observed(seen.inputs, seen.logits, torch.zeros_like(seen.gates), torch.zeros_like(seen.chosen))
    for method in METHODS.values():
        found = method.reduce(own, idle, 2)
        assert all(bool(part.isfinite().all()) for part in found.experts.units.values())
        torch.testing.assert_close(found.router.sum(1), torch.ones(2, dtype=torch.float64))


def test_groups_have_a_largest_size() -> None:
    similar = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]).double()
    assert by_centres(torch.cat([similar, torch.zeros(5, 3).double()], 1), [0, 1], 3) == [[0, 2, 3], [1, 4]]


@pytest.mark.parametrize("family", MIXTURES)
def test_groups_of_one_change_nothing(tmp_path: Path, made: dict[str, Path], family: str) -> None:
    out = shrunk(made, family, tmp_path / "out", experts=4, method="merge_moe").out
    before, after = load_file(made[family] / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("mixtral", "ream"),
        ("qwen2-moe", "hc_smoe"),
        ("qwen3-moe", "sub_moe"),
        ("olmoe", "msmoe"),
        ("gpt-oss", "merge_moe"),
    ],
)
def test_smaller_mixtures_load_and_generate(tmp_path: Path, made: dict[str, Path], family: str, method: str) -> None:
    result = shrunk(made, family, tmp_path / "out", experts=1 if family == "mixtral" else 2, method=method)
    config = json.loads((result.out / "config.json").read_text())
    wanted = 1 if family == "mixtral" else 2
    key = next(key for key in ("num_local_experts", "num_experts") if key in config)
    assert (config[key], config["num_experts_per_tok"]) == (wanted, wanted)
    assert ("experts per token: 1 in place of 2" in result.record["warnings"]) == (family == "mixtral")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.generate(torch.tensor([[5, 9]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
    assert command("verify", result.out).code == 0


_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
OTHERS = {
    "granite": (_config("GraniteMoe", num_local_experts=4, num_experts_per_tok=2), "GraniteMoeForCausalLM"),
    "ernie": (
        _config("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=1),
        "Ernie4_5_MoeForCausalLM",
    ),
    "minimax": (_config("MiniMaxM2", num_local_experts=4, num_experts_per_tok=2, head_dim=8), "MiniMaxM2ForCausalLM"),
    "afmoe": (_config("Afmoe", **_MOE, num_experts=4, num_shared_experts=1, num_dense_layers=1), "AfmoeForCausalLM"),
    "hunyuan": (_config("HunYuanMoEV1", num_experts=4, moe_topk=2, head_dim=8), "HunYuanMoEV1ForCausalLM"),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_names_of_routers_biases_and_keys(tmp_path: Path, made: dict[str, Path], family: str) -> None:
    """Granite packs experts under names of its own, and the biases of some routers stand beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, OTHERS[family])
        model = save(tmp_path / "model", family)
    add_tokenizer(model)
    for name, count in (("same", 4), ("out", 1)):
        out = shrunk(made, model, tmp_path / name, experts=count, method="merge_moe").out
        smaller, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert smaller.generate(torch.tensor([[5, 9]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
        config = json.loads((out / "config.json").read_text())
        found = [[config[key] for key in keys if key in config] for keys in (COUNTS, CHOSEN)]
        assert found == [[count], [min(count, 2)]]
    assert torch.equal(logits(tmp_path / "same"), logits(model))


def test_experts_that_are_computed_otherwise(tmp_path: Path, made: dict[str, Path]) -> None:
    """Llama 4's experts read inputs that the router scaled."""
    make = _config("Llama4Text", num_local_experts=4, num_experts_per_tok=1, head_dim=8, interleave_moe_layer_step=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama4", (make, "Llama4ForCausalLM"))
        model = save(tmp_path / "model", "llama4")
    add_tokenizer(model)
    with pytest.raises(UnsupportedError, match="the experts of Llama4ForCausalLM are not computed as those"):
        shrunk(made, model, tmp_path / "out", experts=2, method="reap")


def test_a_tensor_beside_the_experts_that_is_not_known() -> None:
    assert _per_expert("model.layers.1.mlp.odds", "model.layers.1.mlp", (4,), 4)
    assert _per_expert("model.layers.1.mlp.odds", "model.layers.1.mlp", (1, 4), 4)
    assert not _per_expert("model.layers.1.mlp.shared_experts.up", "model.layers.1.mlp", (4, 2), 4)
    assert not _per_expert("model.layers.1.self_attn.odds", "model.layers.1.mlp", (4,), 4)


@pytest.mark.parametrize("per_token", [9, 0])
def test_more_experts_per_token_than_there_are(tmp_path: Path, made: dict[str, Path], per_token: int) -> None:
    bad = changed(made["mixtral"], tmp_path / "bad", lambda _: None)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": per_token}))
    with pytest.raises(CheckpointError, match=f"{per_token} experts compute each token, and its layers have 4"):
        shrunk(made, bad, tmp_path / "out", experts=2, method="reap")
    with pytest.raises(CheckpointError, match=f"num_experts_per_tok is {per_token}, and there are 4 experts"):
        mix({"join": [{"source_model": str(bad), "experts": [0]}]}, tmp_path / "out")


def test_routing_in_groups_is_kept(tmp_path: Path) -> None:
    """DeepSeek-V3 chooses among groups of experts first, by the two best of each: groups shrink by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        make, kind = FAMILIES["deepseek-v3"]

        def eight() -> Any:
            config = make()
            config.n_routed_experts = 8
            return config

        patch.setitem(FAMILIES, "deepseek-v3", (eight, kind))
        model = save(tmp_path / "eight", "deepseek-v3")
    add_tokenizer(model)
    weights = load_file(model / "model.safetensors")
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    weights[bias] = torch.arange(8.0)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text(text(1, 60), encoding="utf-8")
    result = shrunk({"text": tmp_path / "text.txt"}, model, tmp_path / "out", experts=4, method="reap")
    groups = result.record["mixture"]["groups"]
    assert list(groups) == [f"model.layers.{layer}.mlp.experts" for layer in (1, 2, 3)]
    for each in groups.values():
        assert [expert < 4 for [expert] in each] == [True, True, False, False]
    kept = [expert for [expert] in groups["model.layers.2.mlp.experts"]]
    found = load_file(result.out / "model.safetensors")
    assert torch.equal(found[bias], weights[bias][kept])
    dense = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[dense], weights[dense])
    transformers.AutoModelForCausalLM.from_pretrained(result.out)


def _identical(weights: Weights) -> None:
    for name in weights:
        if ".experts." in name and ".experts.0." not in name:
            head, _, rest = name.partition(".experts.")
            if rest[0].isdigit():
                weights[name] = weights[f"{head}.experts.0.{rest.partition('.')[2]}"].clone()
            else:
                weights[name] = weights[name][:1].expand_as(weights[name]).contiguous()


@pytest.mark.parametrize(
    ("family", "method"), [*(("mixtral", method) for method in METHODS), ("gpt-oss", "ream"), ("gpt-oss", "merge_moe")]
)
def test_identical_experts_compute_the_same(tmp_path: Path, made: dict[str, Path], family: str, method: str) -> None:
    """Whatever the routers, as these models give each token weights that sum to one."""
    same = changed(made[family], tmp_path / "same", _identical)
    out = shrunk(made, same, tmp_path / "out", experts=2, method=method).out
    torch.testing.assert_close(logits(out), logits(same), rtol=1e-4, atol=1e-5)


def _doubled(weights: Weights) -> None:
    for name in weights:
        if ".experts." in name:
            head, _, rest = name.partition(".experts.")
            number, _, leaf = rest.partition(".")
            weights[name] = weights[f"{head}.experts.{int(number) % 2}.{leaf}"].clone()
        elif name.endswith("gate.weight"):
            weights[name] = weights[name][[0, 1, 0, 1]]


@pytest.mark.parametrize("method", ["hc_smoe", "sub_moe"])
def test_copies_of_experts_are_found(tmp_path: Path, made: dict[str, Path], method: str) -> None:
    """Of two experts twice, the two of a token are the copies of one; so the mass of routing is the same, too."""
    twice = changed(made["mixtral"], tmp_path / "twice", _doubled)
    result = shrunk(made, twice, tmp_path / "out", experts=2, method=method, per_token=1)
    assert all(each == [[0, 2], [1, 3]] for each in result.record["mixture"]["groups"].values())
    torch.testing.assert_close(logits(result.out), logits(twice), rtol=1e-4, atol=1e-5)


def test_layouts_give_the_same(tmp_path: Path, made: dict[str, Path]) -> None:
    def pack(weights: Weights) -> None:
        for layer in range(4):
            head = f"model.layers.{layer}.mlp.experts"
            parts = {
                kind: torch.stack([weights.pop(f"{head}.{e}.{kind}_proj.weight") for e in range(4)])
                for kind in ("gate", "up", "down")
            }
            weights[f"{head}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
            weights[f"{head}.down_proj"] = parts["down"]

    packed = changed(made["qwen3-moe"], tmp_path / "packed", pack)
    one = shrunk(made, "qwen3-moe", tmp_path / "one", experts=2, method="msmoe").out
    two = shrunk(made, packed, tmp_path / "two", experts=2, method="msmoe").out
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(two / "model.safetensors")
    assert torch.equal(logits(one), logits(two))


def test_dry_run_says_what_would_happen(tmp_path: Path, made: dict[str, Path]) -> None:
    found = command(
        "shrink", made["mixtral"], tmp_path / "out", "--experts", 1, "--method", "ream", "--dry-run",
        "--sequences", 2, "--length", 24, "--data", made["text"],
    )  # fmt: skip
    assert found.code == 0, found.err
    parameters = sum(each.numel() for each in load_file(made["mixtral"] / "model.safetensors").values())
    lines = found.out.splitlines()
    assert lines[0] == f"shrinking {made['mixtral']} by ream"
    assert lines[1:3] == ["experts: 4 -> 1 in each of 4 layers", "per token: 2 -> 1"]
    assert lines[3].startswith("parameters: ")
    assert lines[4] == "observed on 2 sequences, 48 tokens"
    assert not (tmp_path / "out").exists()
    plan = run.plan_shrinking(made["mixtral"], [str(made["text"])], experts=1, method="ream", sequences=2, length=24)
    assert plan.parameters == parameters
    assert plan.parameters_after == parameters - 4 * 3 * (3 * 32 * 48 + 32)


def test_what_is_printed_and_recorded(tmp_path: Path, made: dict[str, Path]) -> None:
    out = tmp_path / "out"
    arguments = [
        "shrink",
        made["mixtral"],
        out,
        "--experts",
        2,
        "--sequences",
        2,
        "--length",
        24,
        "--data",
        made["text"],
    ]
    found = command(*arguments)
    assert found.code == 0, found.err
    assert found.out.startswith("reap · 4 -> 2 experts, 2 per token · ")
    record = json.loads((out / "merge.json").read_text())
    assert record["mixture"]["data"]["counted"] == 48
    assert "with 2 experts per layer in place of 4" in (out / "README.md").read_text()
    assert command(*arguments).code == 2
    assert command(*arguments, "--overwrite").code == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out"]


def test_a_run_that_fails_leaves_nothing(
    tmp_path: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_plan", stopped)
    with pytest.raises(KeyboardInterrupt):
        shrunk(made, "mixtral", tmp_path / "deep" / "out", experts=2, method="reap")
    assert list((tmp_path / "deep").iterdir()) == []


_EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
_ROUTER = "model.layers.1.block_sparse_moe.gate.weight"

MODELS: dict[str, tuple[str, Callable[[Weights], Any], str]] = {
    "an expert without a projection": ("mixtral", lambda w: w.pop(_EXPERT), "expert 3 has no gate projection"),
    "an expert too many": (
        "mixtral",
        lambda w: w.update({_EXPERT.replace(".3.", ".4."): w[_EXPERT].clone()}),
        "has an expert 4; config.json says 4 experts",
    ),
    "shapes that differ": (
        "mixtral",
        lambda w: w.update({_EXPERT: w[_EXPERT][:40]}),
        "experts.3.w1.weight has the shape [40, 32], config.json asks for [48, 32]",
    ),
    "router rows too few": (
        "mixtral",
        lambda w: w.update({_ROUTER: w[_ROUTER][:3]}),
        "has the shape [3, 32], and for 4 experts it must be [4, 32]",
    ),
    "no router": ("mixtral", lambda w: w.pop(_ROUTER), "the router's weight is missing"),
    "NaN in an expert": ("mixtral", lambda w: w[_EXPERT].fill_(torch.nan), "NaN or infinity"),
    "an expert in float64": ("mixtral", lambda w: w.update({_EXPERT: w[_EXPERT].double()}), "w1.weight holds float64"),
    "packed experts too few": (
        "gpt-oss",
        lambda w: w.update({"model.layers.1.mlp.experts.down_proj": w["model.layers.1.mlp.experts.down_proj"][:3]}),
        "has the shape [3, 48, 32], config.json asks for [4, 48, 32]",
    ),
    "a bias of packed experts missing": (
        "gpt-oss",
        lambda w: w.pop("model.layers.1.mlp.experts.down_proj_bias"),
        "mlp.experts.down_proj_bias is missing",
    ),
    "no experts at all": (
        "mixtral",
        lambda w: [w.pop(name) for name in list(w) if "layers.1." in name and ".experts." in name],
        "the tensors of its experts are missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_refused(tmp_path: Path, made: dict[str, Path], name: str) -> None:
    family, change, wanted = MODELS[name]
    bad = changed(made[family], tmp_path / "bad", change)
    found = command("shrink", bad, tmp_path / "out", "--experts", 2, "--data", made["text"])
    assert (found.code, wanted in found.err) == (2, True), found.err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad"]


OPTIONS: dict[str, tuple[str, list[Any], str]] = {
    "too many experts": ("mixtral", ["--experts", 5], "--experts: must be 1 to 4"),
    "too many per token": ("mixtral", ["--experts", 2, "--per-token", 3], "--per-token: must be 1 to 2"),
    "a method that is not known": (
        "mixtral",
        ["--experts", 2, "--method", "reaap"],
        "--method: 'reaap' is not known. Did you mean 'reap'?",
    ),
    "routing groups cut": ("deepseek-v3", ["--experts", 3], "must be a multiple of 2, and at least 4; found 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_are_refused(tmp_path: Path, made: dict[str, Path], name: str) -> None:
    family, options, wanted = OPTIONS[name]
    found = command("shrink", made[family], tmp_path / "out", *options, "--data", made["text"])
    assert (found.code, wanted in found.err) == (2, True), found.err


def test_other_bad_input(tmp_path: Path, made: dict[str, Path]) -> None:
    assert "--data is missing" in command("shrink", made["mixtral"], tmp_path / "out", "--experts", 2).err
    dense = save(tmp_path / "dense", "llama")
    add_tokenizer(dense)
    found = command("shrink", dense, tmp_path / "out", "--experts", 2, "--data", made["text"])
    assert found.code == 2
    assert "LlamaForCausalLM has no layers of experts" in found.err
