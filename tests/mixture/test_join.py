"""Contributors' mixtures joined: experts beside each other, the shared part compared, experts dropped again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merganser.errors import MergeError
from merganser.mixture import mix
from tests.calibration.families import FAMILIES, _config, save
from tests.cli.tiny import run
from tests.evaluation.tiny import add_tokenizer
from tests.mixture.making import logits

Weights = dict[str, torch.Tensor]


def public(root: Path, family: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        flex = _config("FlexOlmo", num_experts_per_tok=2, num_experts=2)
        patch.setitem(FAMILIES, "flex", (flex, "FlexOlmoForCausalLM"))
        folder = save(root, family)
    add_tokenizer(folder)
    return folder


def contributor(base: Path, to: Path, seed: int, change: Callable[[Weights], Any] | None = None, **config: Any) -> Path:
    """A copy whose experts but the first were trained, with their rows of the router."""
    shutil.copytree(base, to)
    weights = load_file(to / "model.safetensors")
    draw = torch.Generator().manual_seed(seed)
    for name, each in weights.items():
        trained = each.clone() + 0.3 * torch.randn(each.shape, generator=draw)
        if ".experts." in name and name.split(".experts.")[1][0].isdigit():
            weights[name] = each if ".experts.0." in name else trained
        elif ".experts." in name or ".gate." in name or ".router." in name:
            weights[name] = torch.cat([each[:1], trained[1:]])
    if change is not None:
        change(weights)
    save_file({name: each.contiguous() for name, each in weights.items()}, to / "model.safetensors", {"format": "pt"})
    found = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(found | config))
    return to


@pytest.fixture(scope="module")
def flex(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("flex")
    base = public(root / "public", "flex")
    return [contributor(base, root / f"c{seed}", seed) for seed in (1, 2, 3)]


def joined(models: list[Path], **keys: Any) -> dict[str, Any]:
    return {"join": [{"source_model": str(model)} for model in models], **keys}


def weights_of(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def test_experts_stand_beside_each_other(tmp_path: Path, flex: list[Path]) -> None:
    result = mix(joined(flex, experts_per_token=3), tmp_path / "out")
    found, theirs = weights_of(result.out), [weights_of(model) for model in flex]
    config = json.loads((result.out / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (4, 3)
    for name, each in found.items():
        if ".gate." in name:
            assert torch.equal(each, torch.cat([theirs[0][name], theirs[1][name][1:], theirs[2][name][1:]]))
        elif ".experts." in name:
            number = int(name.split(".experts.")[1].split(".")[0])
            own = name.replace(f".experts.{number}.", f".experts.{min(number, 1)}.")
            assert torch.equal(each, theirs[max(0, number - 1)][own])
        else:
            assert torch.equal(each, theirs[0][name])
    _model, info = transformers.AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert result.record["mixture"]["experts"][3] == f"{flex[2]} (expert 1)"
    shared = sum(".gate." not in name and ".experts.1." not in name for name in theirs[0])
    assert result.record["mixture"]["router"] == {"compared": 2 * shared, "odd_rows": []}
    reasons = {each["reason"] for entry in result.record["census"] for each in entry["left_out"]}
    assert reasons == {"its expert is not taken", "the first contributor's is the same"}


def test_an_expert_is_dropped_again(tmp_path: Path, flex: list[Path]) -> None:
    """What remains is what the others make, byte by byte."""
    mix(joined(flex), tmp_path / "all")
    mix({"join": [{"source_model": str(tmp_path / "all"), "experts": [0, 1, 3]}]}, tmp_path / "without")
    mix(joined([flex[0], flex[2]]), tmp_path / "others")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "without" / name).read_bytes() == (tmp_path / "others" / name).read_bytes()
    torch.testing.assert_close(logits(tmp_path / "without"), logits(tmp_path / "others"))
    mix({"join": [{"source_model": str(tmp_path / "all"), "experts": [0, 1]}]}, tmp_path / "first")
    assert all(torch.equal(each, weights_of(flex[0])[name]) for name, each in weights_of(tmp_path / "first").items())
    single = mix({"join": [{"source_model": str(tmp_path / "all"), "experts": [2]}]}, tmp_path / "single").out
    assert json.loads((single / "config.json").read_text())["num_experts_per_tok"] == 1


def test_packed_experts_and_biases_of_routers(tmp_path: Path) -> None:
    base = public(tmp_path / "base", "gpt-oss")
    models = [contributor(base, tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    written = {"join": [{"source_model": str(models[0])}, {"source_model": str(models[1]), "experts": [3, 1]}]}
    found = weights_of(mix(written, tmp_path / "out").out)
    one, two = map(weights_of, models)
    for name, each in found.items():
        if ".experts." in name or ".router." in name:
            assert torch.equal(each, torch.cat([one[name], two[name][[3, 1]]]))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_rows_of_the_shared_expert_that_differ_are_averaged(tmp_path: Path, flex: list[Path]) -> None:
    def other_row(weights: Weights) -> None:
        name = "model.layers.1.mlp.gate.weight"
        weights[name] = weights[name] + torch.tensor([[1.0], [0.0]])

    odd = contributor(flex[0].parent / "public", tmp_path / "odd", 5, other_row)
    result = mix(joined([*flex[:2], odd]), tmp_path / "out")
    name = "model.layers.1.mlp.gate.weight"
    rows = torch.stack([weights_of(model)[name][0] for model in (*flex[:2], odd)])
    torch.testing.assert_close(weights_of(result.out)[name][0], rows.mean(0))
    assert torch.equal(weights_of(result.out)[name][3], weights_of(odd)[name][1])
    assert any("row of expert 0 is another one" in each for each in result.record["warnings"])


def test_command(tmp_path: Path, flex: list[Path]) -> None:
    (tmp_path / "join.yaml").write_text(json.dumps(joined(flex)))
    found = run("mix", tmp_path / "join.yaml", tmp_path / "out")
    assert found.code == 0, found
    assert "4 experts, 2 per token" in found.out
    assert "shared tensors, bit for bit" in found.out
    assert run("verify", tmp_path / "out").code == 0
    assert "joined with" in (tmp_path / "out" / "README.md").read_text()


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], Any]:
    return lambda weights: weights.update({name: change(weights[name])})


_Q = "model.layers.1.self_attn.q_proj.weight"
_E0, _E1 = (f"model.layers.1.mlp.experts.{number}.up_proj.weight" for number in (0, 1))
BAD_MODELS: dict[str, tuple[Callable[[Weights], Any] | None, dict[str, Any], str]] = {
    "attention": (_set(_Q, lambda w: w + 1e-6), {}, f"{_Q}: differs from that of"),
    "expert 0": (_set(_E0, lambda w: w + 1e-6), {}, f"{_E0}: differs from that of"),
    "dtype": (_set(_E1, lambda w: w.bfloat16()), {}, "experts that are joined must be alike"),
    "no tensor": (lambda w: w.pop("model.layers.1.self_attn.q_norm.weight"), {}, "q_norm"),
    "no expert": (lambda w: [w.pop(n) for n in list(w) if "layers.1.mlp.experts.1." in n], {}, "layer 1 of model.layers has no mlp.experts.1.down_proj.weight"),
    "few rows": (_set("model.layers.1.mlp.gate.weight", lambda w: w[:1]), {}, "has 1 rows, and there are 2 experts"),
    "another config": (None, {"norm_topk_prob": True}, "has norm_topk_prob True"),
    "groups": (None, {"n_group": 2}, "groups of experts first (n_group), which cannot be joined"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_mixtures_that_do_not_share_the_rest(tmp_path: Path, flex: list[Path], case: str) -> None:
    change, config, message = BAD_MODELS[case]
    bad = contributor(flex[0].parent / "public", tmp_path / "bad", 7, change, **config)
    with pytest.raises(MergeError) as caught:
        mix(joined([flex[0], bad]), tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


BAD_RECIPES: dict[str, tuple[Callable[[list[Path]], dict[str, Any]], str]] = {
    "a typo": (lambda m: joined(m, expert_per_token=2), "unknown key 'expert_per_token'. Did you mean 'experts_per_token'?"),
    "with experts": (lambda m: joined(m, experts=[]), "unknown key 'experts'"),
    "a copy": (lambda m: joined(m[:1]), "one mixture and all of its experts is a copy"),
    "twice": (lambda m: joined([m[0], m[0]]), "is joined twice"),
    "no such expert": (lambda m: {"join": [{"source_model": str(m[0]), "experts": [2]}]}, "has no expert 2; its experts are 0 to 1"),
    "an expert twice": (lambda m: {"join": [{"source_model": str(m[0]), "experts": [1, 1]}]}, "names expert 1 twice"),
    "too many per token": (lambda m: joined(m, experts_per_token=5), "experts_per_token: 5, and there are 4 experts"),
    "no such model": (lambda m: joined([m[0], Path("none")]), "join[1].source_model: model 'none' not found"),
    "empty": (lambda _m: {"join": []}, "the list is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipes(tmp_path: Path, flex: list[Path], case: str) -> None:
    make, message = BAD_RECIPES[case]
    (tmp_path / "join.yaml").write_text(json.dumps(make(flex)))
    found = run("mix", tmp_path / "join.yaml", tmp_path / "out")
    assert (found.code, message in found.err) == (2, True), found


def test_a_router_of_another_width(tmp_path: Path, flex: list[Path]) -> None:
    """What the model would not load is not written."""

    def narrow(weights: Weights) -> None:
        weights["model.layers.1.mlp.gate.weight"] = weights["model.layers.1.mlp.gate.weight"][:, :-1]

    bad = contributor(flex[0].parent / "public", tmp_path / "bad", 7, narrow)
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.gate\.weight is \[1, 31\], the config describes \[1, 32\]"):
        mix({"join": [{"source_model": str(bad), "experts": [1]}]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_model_has_nothing_to_join(tmp_path: Path, flex: list[Path]) -> None:
    dense = save(tmp_path / "dense", "olmo2")
    with pytest.raises(MergeError, match="it has no experts"):
        mix(joined([flex[0], dense]), tmp_path / "out")
