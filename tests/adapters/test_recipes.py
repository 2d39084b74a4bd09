"""Models with adapters in recipes: merged like the models that they stand for, without being written anywhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import merganser
from merganser.engine.plan.summary import summarise
from tests.adapters.test_apply import Q, applied, pair, write_adapter
from tests.making import HIDDEN, assert_equal, llama, llama_config, make_recipe, read_json, read_model, write_model

V = "model.layers.1.self_attn.v_proj"


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A base, two adapters, and the models that they make, in float32."""
    write_model(tmp_path / "base", llama(0, dtype=torch.bfloat16), llama_config())
    write_adapter(tmp_path / "a", pair())
    write_adapter(tmp_path / "b", pair() | pair(V, out=HIDDEN // 2), lora_alpha=1)
    for name in "ab":
        write_model(tmp_path / f"full {name}", applied(tmp_path / name, tmp_path / "base"), llama_config())
    return tmp_path


@pytest.mark.parametrize("method", ["ties", "knots", "slerp"])
def test_merged_like_the_models_in_float32(zoo: Path, method: str) -> None:
    base, parameters = zoo / "base", {"ties": {"weight": 1.0, "density": 0.5}, "knots": {}, "slerp": {"t": 0.3}}[method]
    written = [f"{base}+{zoo / 'a'}", f"{base}+{zoo / 'b'}"]
    full = [str(zoo / "full a"), str(zoo / "full b")]
    for name, models in (("out", written), ("expected", full)):
        if method == "slerp":
            recipe = {"merge_method": method, "base_model": models[0], "models": [{"model": m} for m in models]}
        else:
            recipe = make_recipe(method, [Path(m) for m in models], base)
        recipe |= {"parameters": parameters} | ({} if name == "out" else {"out_dtype": "bfloat16"})
        merganser.merge(recipe, zoo / name)
    found = read_model(zoo / "out")
    assert found[f"{V}.weight"].dtype == torch.bfloat16, "an output gets the dtype of the base's files"
    assert_equal(found, read_model(zoo / "expected"))


def test_ways_to_write_it(zoo: Path) -> None:
    base, adapter = str(zoo / "base"), str(zoo / "a")
    outputs = []
    for i, model in enumerate(
        [
            {"model": f"{base}+{adapter}"},
            {"model": base, "adapter": adapter},
            {"model": {"model": base, "lora": adapter}},
        ]
    ):
        merganser.merge({"merge_method": "linear", "models": [model], "parameters": {"weight": 1.0}}, zoo / f"out{i}")
        outputs.append(read_model(zoo / f"out{i}"))
    for other in outputs[1:]:
        assert_equal(other, outputs[0])
    before, after = llama(0, dtype=torch.bfloat16), outputs[0]
    assert [name for name in after if not torch.equal(after[name], before[name])] == [f"{Q}.weight"]


def test_plan_and_record_name_the_adapters(zoo: Path) -> None:
    base = zoo / "base"
    recipe = make_recipe("task_arithmetic", [Path(f"{base}+{zoo / 'a'}"), Path(f"{base}+{zoo / 'b'}")], base)
    recipe["parameters"] = {"weight": 0.5}
    first, *others = summarise(merganser.plan(recipe)).inputs
    assert (first.used_as, first.files) == ("base", 1)
    assert [(each.used_as, each.files, each.dtypes) for each in others] == [("model", 2, ("bfloat16",))] * 2
    record = merganser.merge(recipe, zoo / "out").record
    written = [(entry["model"], [file["sha256"] for file in entry["files"]]) for entry in record["adapters"]]
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert written == [
        (f"{base}+{zoo / key}", [hashlib.sha256((zoo / key / name).read_bytes()).hexdigest() for name in names])
        for key in "ab"
    ]
    tensors = {Path(entry["path"]).parent.name: entry["tensors_read"] for entry in record["inputs"]}
    assert tensors == {"base": len(llama(0)), "a": 1, "b": 2}
    assert f"`base` with the adapter `{'a'}`" in (zoo / "out" / "README.md").read_text()


def test_one_adapter_on_two_bases(zoo: Path) -> None:
    other = write_model(zoo / "other", llama(1, dtype=torch.bfloat16), llama_config())
    recipe = make_recipe("linear", [Path(f"{zoo / 'base'}+{zoo / 'a'}"), Path(f"{other}+{zoo / 'a'}")])
    merganser.merge(recipe | {"out_dtype": "float32", "parameters": {"weight": 1.0}}, zoo / "out")
    expected = (applied(zoo / "a", zoo / "base")[f"{Q}.weight"] + applied(zoo / "a", other)[f"{Q}.weight"]) / 2
    torch.testing.assert_close(read_model(zoo / "out")[f"{Q}.weight"], expected)
    hashes = [entry for entry in read_json(zoo / "out", "merge.json")["inputs"] if "/a/" in entry["path"]]
    assert [(entry["tensors"], entry["tensors_read"]) for entry in hashes] == [(2, 2)]


def test_a_changed_scale_is_another_merge(zoo: Path) -> None:
    """What only the config says is part of the fingerprint by which a run is continued."""
    from merganser.engine.record import fingerprint

    recipe = {"merge_method": "passthrough", "models": [{"model": f"{zoo / 'base'}+{zoo / 'a'}"}]}
    before = fingerprint(merganser.plan(recipe), {})
    write_adapter(zoo / "a", pair(), lora_alpha=12)
    assert fingerprint(merganser.plan(recipe), {}) != before


def test_a_stage_on_a_base_with_an_adapter(zoo: Path) -> None:
    """Stages and adapters together: the result of a stage gets an adapter."""
    text = f"""\
name: mean
merge_method: linear
models: [{{model: {zoo / "base"}}}, {{model: "{zoo / "base"}+{zoo / "a"}"}}]
parameters: {{weight: 1.0}}
---
merge_method: passthrough
models: [{{model: mean, adapter: {zoo / "b"}}}]
"""
    merganser.plan(text)
    merganser.merge(text, zoo / "out")
    found, before = read_model(zoo / "out"), llama(0, dtype=torch.bfloat16)
    assert not torch.equal(found[f"{V}.weight"], before[f"{V}.weight"])
    assert not torch.equal(found[f"{Q}.weight"], before[f"{Q}.weight"])


def test_on_a_quantised_base(zoo: Path) -> None:
    """As QLoRA trains them: the base is dequantised while it is read, and the adapter added to that."""
    tensors = llama(0, dtype=torch.bfloat16)
    coarse = (tensors[f"{Q}.weight"].float() / 0.01).to(torch.float8_e4m3fn)
    tensors |= {f"{Q}.weight": coarse, f"{Q}.weight_scale_inv": torch.full((1, 1), 0.01)}
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    base = write_model(zoo / "coarse", tensors, llama_config() | {"quantization_config": settings})
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{zoo / 'a'}"}], "out_dtype": "float32"}
    merganser.merge(recipe, zoo / "out")
    factors = pair()
    expected = coarse.float() * 0.01 + 3 * factors[f"{Q}.lora_B.weight"] @ factors[f"{Q}.lora_A.weight"]
    torch.testing.assert_close(read_model(zoo / "out")[f"{Q}.weight"], expected, rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in read_json(zoo / "out", "config.json")
