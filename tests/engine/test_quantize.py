"""`quantize`: outputs whose linear layers are stored as float8 with scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from merganser.checkpoint import open_checkpoint
from merganser.checkpoint.float8 import FLOAT8_SCHEMES, decode_float8, encode_float8
from merganser.engine.in_memory.run import merge_to_state_dict
from merganser.engine.merge import merge, plan
from merganser.errors import MergeError, NonFiniteError, RecipeError
from merganser.recipe import load_recipes
from merganser.record import verify
from tests.engine.interrupting import in_a_process, merge_and_die
from tests.making import (
    Tensors,
    llama,
    llama_config,
    make_recipe,
    read_files,
    read_json,
    read_model,
    write_llamas,
    write_model,
)

pytestmark = pytest.mark.usefixtures("small_blocks")


def recipe_of(paths: list[Path], quantize: str, method: str = "ties", **keys: Any) -> dict[str, Any]:
    own = {"weight": 0.6, **({"density": 0.4} if method == "ties" else {})}
    return make_recipe(method, paths[1:], paths[0] if method == "ties" else None, own, quantize=quantize, **keys)


def own_values(folder: Path) -> Tensors:
    checkpoint = open_checkpoint(str(folder))
    with checkpoint.reader() as reader:
        return {name: reader.tensor(tensor) for name, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize("name", FLOAT8_SCHEMES)
@pytest.mark.parametrize("method", ["ties", "linear"])
def test_values_are_those_of_the_merge_rounded_once(tmp_path: Path, name: str, method: str) -> None:
    paths = write_llamas(tmp_path, hidden=144, dtype=torch.bfloat16)
    recipe = recipe_of(paths, name, method)
    out = merge(recipe, tmp_path / "out").out
    # blocks of other sizes add the same numbers in another order, but a linear merge adds none
    wide = {key: value for key, value in recipe.items() if key != "quantize"} | {"out_dtype": "float32"}
    merged = read_model(merge(wide, tmp_path / "wide").out)
    plain = read_model(merge({**wide, "out_dtype": "bfloat16"}, tmp_path / "plain").out)
    found, stored = own_values(out), read_model(out)
    assert found.keys() == merged.keys()
    scheme = FLOAT8_SCHEMES[name]
    for key, value in merged.items():
        if ".layers." in key and value.dim() == 2:
            codes, scales = encode_float8(value, scheme)
            assert stored[key].dtype == torch.float8_e4m3fn
            assert torch.equal(stored[key].float(), codes.float())
            assert torch.equal(stored[key + scheme.suffix], scales)
            assert torch.equal(found[key], decode_float8(codes, scales, scheme))
        else:
            assert torch.equal(stored[key], plain[key])
    assert verify(out).ok


@pytest.mark.parametrize("name", FLOAT8_SCHEMES)
def test_threads_shards_and_kills_change_no_byte(tmp_path: Path, name: str) -> None:
    paths = write_llamas(tmp_path, hidden=144)
    recipe = recipe_of(paths, name)
    whole = merge(recipe, tmp_path / "a" / "out", threads=1).out
    assert read_files(merge(recipe, tmp_path / "b" / "out", threads=3).out) == read_files(whole)
    small = merge(recipe, tmp_path / "c" / "out", threads=2, out_shard_size=20_000).out
    assert len(list(small.glob("*.safetensors"))) > 3
    assert {key: value.view(torch.uint8).tolist() for key, value in read_model(small).items() if value.dim()} == {
        key: value.view(torch.uint8).tolist() for key, value in read_model(whole).items() if value.dim()
    }
    if name == "fp8_channel":
        return  # scales lie in the files in the same way
    for after in (90, "before the side files"):
        out = tmp_path / f"killed {after}" / "out"
        out.parent.mkdir()
        process = in_a_process(merge_and_die, recipe, out, after, {"threads": 1})
        process.join()
        assert process.exitcode == -9
        result = merge(recipe, out)
        assert result.record["continued"]
        assert read_files(result.out) == read_files(whole)
        assert verify(out).ok


def test_config_names_what_is_not_float8(tmp_path: Path) -> None:
    tensors, config = llama(0), llama_config(tied=True)
    config["num_local_experts"] = 2
    for i in range(2):
        tensors[f"model.layers.{i}.mlp.gate.weight"] = torch.randn(2, 16)
        tensors[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.randn(2, 16, 8)
        tensors[f"model.layers.{i}.mlp.experts.0.up_proj.weight"] = torch.randn(8, 16)
    paths = [write_model(tmp_path / "a", tensors, {**config, "model_type": "x", "architectures": ["X"]})]
    planned = plan(make_recipe("passthrough", paths, quantize="fp8_block"))
    settings = planned.config["quantization_config"]
    kept = settings.pop("modules_to_not_convert")
    assert settings == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    layers = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("experts", "gate")]
    assert sorted(kept) == sorted(["lm_head", *layers])
    own = {tensor.name for tensor in planned.tensors if tensor.quantised is not None}
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in own
    assert not any("norm" in name or "embed" in name or "gate." in name or "lm_head" in name for name in own)
    assert any("2 stacks of experts" in warning for warning in planned.warnings)
    assert any("fp8_channel fits every shape" in warning for warning in planned.warnings)
    joined = "not for vLLM, which refuses it or takes other scales: it joins model.layers.0."
    assert any(joined in warning for warning in planned.warnings)
    assert not any("vLLM" in each for each in plan(make_recipe("passthrough", paths, quantize="fp8_channel")).warnings)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quantize": "fp8_blok"}, "Did you mean 'fp8_block'"),
        ({"quantize": 8}, "fp8_block"),
        ({"out_dtype": "float8_e4m3fn"}, "quantize: fp8_block or fp8_channel"),
        ({"dtype": "fp8"}, "quantize: fp8_block or fp8_channel"),
        ({"quantise": "fp8_block"}, "Did you mean 'quanti"),
    ],
)
def test_wrong_keys_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(make_recipe("linear", write_llamas(tmp_path, 2), **keys))


def test_outputs_that_cannot_be_float8_are_refused(tmp_path: Path) -> None:
    a, b = write_llamas(tmp_path, 2)

    def refused(message: str, recipe: dict[str, Any], error: type[MergeError] = RecipeError, **options: Any) -> None:
        with pytest.raises(error, match=message):
            merge(recipe, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    recipe = make_recipe("linear", [a, b], None, {"weight": 1}, quantize="fp8_block")
    refused("restores each model", make_recipe("emr", [b], a, quantize="fp8_block"))
    config = (a / "config.json").read_text()
    (a / "config.json").write_text(config.replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    (b / "config.json").write_text(config.replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    refused("turned", recipe)
    for path in (a, b):
        (path / "config.json").unlink()
    refused("no config.json", recipe)
    broken = llama(0)
    broken["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.inf
    c = write_model(tmp_path / "c", broken, llama_config())
    refused(
        "float8 with scales cannot store",
        make_recipe("passthrough", [c], quantize="fp8_block"),
        NonFiniteError,
        allow_nonfinite=True,
    )


@pytest.mark.parametrize("name", FLOAT8_SCHEMES)
def test_memory_and_later_stages_see_the_rounded_values(tmp_path: Path, name: str) -> None:
    paths = write_llamas(tmp_path)
    first = recipe_of(paths, name, name="first")
    values = own_values(merge(first, tmp_path / "one").out)
    found = merge_to_state_dict(plan(first))
    assert found.keys() == values.keys()
    assert all(torch.equal(found[key], values[key].to(found[key].dtype)) for key in values)
    second = make_recipe("passthrough", [Path("first")])
    text = "\n---\n".join(yaml.safe_dump(each) for each in (first, second))
    out = merge(load_recipes(text), tmp_path / "two").out
    again = read_model(out)
    assert all(torch.equal(again[key], values[key].to(again[key].dtype)) for key in values)
    assert "quantization_config" not in read_json(out, "config.json")


def mixture(folder: Path, seed: int, *, stacked: bool, hidden: int = 16, **changes: Any) -> Path:
    """A model of two layers with three experts, in one tensor each or one by one."""
    config = {**llama_config(), "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 3}
    config |= {"hidden_size": hidden, "moe_intermediate_size": 24, **changes}
    tensors: Tensors = {}
    for name, tensor in llama(seed, hidden=hidden).items():
        home, _, leaf = name.partition(".mlp.")
        if not leaf:
            tensors[name] = tensor
            continue
        generator = torch.Generator().manual_seed(seed)
        for number in range(3):
            tensors[f"{home}.mlp.experts.{number}.{leaf}"] = tensor + torch.rand(tensor.shape, generator=generator)
    for home in [f"model.layers.{layer}.mlp" for layer in range(2)]:
        tensors[f"{home}.gate.weight"] = torch.ones(3, hidden)
        if stacked:
            each = [
                {leaf: tensors.pop(f"{home}.experts.{n}.{leaf}_proj.weight") for leaf in ("gate", "up", "down")}
                for n in range(3)
            ]
            both = [torch.cat([own["gate"], own["up"]]) for own in each]
            tensors[f"{home}.experts.gate_up_proj"] = torch.stack(both)
            tensors[f"{home}.experts.down_proj"] = torch.stack([own["down"] for own in each])
    return write_model(folder, tensors, config)


@pytest.mark.parametrize("name", FLOAT8_SCHEMES)
def test_stacked_experts_are_written_one_by_one(tmp_path: Path, name: str) -> None:
    single = [mixture(tmp_path / f"single{n}", n, stacked=False) for n in range(3)]
    stacked = [mixture(tmp_path / f"stacked{n}", n, stacked=True) for n in range(3)]
    expected = merge(recipe_of(single, name), tmp_path / "expected").out
    planned = plan(recipe_of(stacked, name))
    assert (
        f"{stacked[0]}: 4 stacks of experts such as model.layers.0.mlp.experts.gate_up_proj are merged and written one"
        in "\n".join(planned.warnings)
    )
    out = merge(recipe_of(stacked, name), tmp_path / "out").out
    found, wanted = read_model(out), read_model(expected)
    assert {n: t.view(torch.uint8).tolist() for n, t in found.items() if t.dim()} == {
        n: t.view(torch.uint8).tolist() for n, t in wanted.items() if t.dim()
    }
    assert read_json(out, "config.json") == read_json(expected, "config.json")
    assert verify(out).ok
    # a model of each kind
    assert read_model(merge(recipe_of([stacked[0], *single[1:]], name), tmp_path / "both").out).keys() == wanted.keys()
    # quantised stacks, and those with an adapter, are computed while they are read
    again = merge(make_recipe("passthrough", [out], quantize=name), tmp_path / "again").out
    assert read_model(again).keys() == wanted.keys()


@pytest.mark.parametrize("changes", [{"model_type": "gpt_oss"}, {"hidden_size": 17}])
def test_other_stacks_keep_their_precision(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = mixture(tmp_path / "a", 0, stacked=True)
    config = read_json(path, "config.json") | {"architectures": ["X"], **changes}
    (path / "config.json").write_text(json.dumps(config))
    planned = plan(make_recipe("passthrough", [path], quantize="fp8_channel"))
    assert any(
        "4 stacks of experts such as" in w and "keep their precision: no program is known" in w
        for w in planned.warnings
    )
    assert "model.layers.0.mlp.experts.gate_up_proj" in {tensor.name for tensor in planned.tensors}
