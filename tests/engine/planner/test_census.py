"""Every tensor of every input is merged, copied, or left out for a stated reason, whatever the architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merganser.engine.merge import merge, plan
from merganser.engine.plan.plan import Plan
from merganser.engine.plan.sections.census import InputCensus, census_text
from merganser.engine.planner.census import NOT_KNOWN
from merganser.recipe import load_recipes
from tests.anatomy.architectures import ARCHITECTURES, real
from tests.anatomy.test_hybrids import HYBRIDS, hybrid
from tests.making import llama, llama_config, make_recipe


def written(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(tmp_path: Path, recipe: object) -> Plan:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return plan(load_recipes(file))


def check_sums(found: Plan) -> list[InputCensus]:
    for reference, census in found.census.items():
        with safe_open(Path(reference.path) / "model.safetensors", "pt") as file:
            assert census.tensors == len(file.keys())
        assert NOT_KNOWN not in census.left_out.values()
    return list(found.census.values())


FEWEST = 30
"""Architectures that must be counted, at least."""


def test_enough_architectures() -> None:
    assert len(ARCHITECTURES.keys() | HYBRIDS.keys()) >= FEWEST


@pytest.mark.parametrize("name", [*ARCHITECTURES, *HYBRIDS])
def test_sums_for_every_architecture(name: str, tmp_path: Path) -> None:
    """As whole models, and as a slice of layers where the architecture has one stack of them."""
    known = real(name) if name in ARCHITECTURES else hybrid(name)
    tensors = {each: torch.zeros(shape, dtype=torch.bfloat16) for each, shape in known.shapes.items()}
    paths = [written(tmp_path / each, tensors, known.config) for each in "ab"]
    whole = check_sums(planned(tmp_path, make_recipe("linear", paths, None, {"weight": 0.5})))
    assert [census.merged for census in whole] == [len(tensors)] * 2
    if name in ("t5", "whisper", "modernbert", "bert", "roberta"):
        return  # two stacks, or heads that a recipe of slices does not take
    sources = [{"model": str(paths[0]), "layer_range": [0, 1]}]
    slices = check_sums(planned(tmp_path, {"merge_method": "passthrough", "slices": [{"sources": sources}]}))
    assert slices[0].merged == 0
    assert slices[0].copied + len(slices[0].left_out) == len(tensors)
    assert set(slices[0].left_out.values()) <= {"its layer is in no slice"}


def test_reasons(tmp_path: Path) -> None:
    """A tied head, leftovers of training, integers, models of the middle of a stack."""
    base, tuned = llama(0), llama(1)
    config = llama_config(tied=True)
    base["ids"] = tuned["ids"] = torch.arange(3)
    base.pop("lm_head.weight")
    tuned["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 16)
    paths = [written(tmp_path / "a", base, config), written(tmp_path / "b", tuned, config)]
    found = planned(tmp_path, make_recipe("linear", paths, None, {"weight": 0.5}, unmatched="skip"))
    first, second = check_sums(found)
    assert (first.merged, first.copied, dict(first.left_out)) == (len(base) - 1, 1, {})
    assert dict(second.left_out) == {
        "model.layers.0.self_attn.q_proj.lora_A.weight": "no model class loads it: LoRA factors that were not merged into "
        "the weights",
        "lm_head.weight": "a copy of the embedding, to which the head is tied",
    }
    assert census_text(found.census.values()) == (
        f"{len(base) + len(tuned)} tensors of the inputs: {2 * len(base) - 2} merged, 2 copied, 2 left out (1: no model class "
        "loads it: LoRA factors that were not merged into the weights; 1: a copy of the embedding, to which the head is tied)"
    )


def test_outer_tensors_of_the_middle(tmp_path: Path) -> None:
    paths = [written(tmp_path / name, llama(i, 3), llama_config(3)) for i, name in enumerate("abc")]
    slices = [
        {"sources": [{"model": str(path), "layer_range": [i, i + 1]}]} for i, path in enumerate([*paths[:2], paths[0]])
    ]
    recipe = {"merge_method": "passthrough", "slices": slices, "base_model": str(paths[2])}
    first, second, *_ = reversed(check_sums(planned(tmp_path, recipe)))
    reasons = set(first.left_out.values()) | set(second.left_out.values())
    assert "its layer is in no slice" in reasons
    assert "what lies outside the layers comes from the models of the first or last slice" in reasons


def test_the_record_has_it(tmp_path: Path) -> None:
    tensors = llama(0)
    scaled = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items() if "proj" in name}
    stored = {**tensors, **scaled, **{f"{name}_scale": torch.ones(1) for name in scaled}}
    stored |= {f"{name.removesuffix('.weight')}.input_scale": torch.ones(1) for name in scaled}
    config = llama_config() | {"quantization_config": {"quant_method": "compressed-tensors"}}
    paths = [written(tmp_path / name, stored, config) for name in "ab"]
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(make_recipe("linear", paths, None, {"weight": 0.5}, dtype="float32")))
    result = merge(load_recipes(file), tmp_path / "out")
    (first, second) = result.record["census"]
    assert first == {**second, "model": str(paths[0])}
    assert (first["tensors"], first["merged"], first["copied"]) == (len(tensors) + len(scaled), len(tensors), 0)
    (left,) = first["left_out"]
    assert left["reason"] == "a scale of activations, or a layout, which unquantised weights have no use for"
    assert len(left["tensors"]) == len(scaled)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor if name not in scaled else scaled[name].float()
        assert torch.equal(merged[name], expected)
