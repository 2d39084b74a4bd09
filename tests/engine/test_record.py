"""The run record and the model card."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import merganser
from merganser.engine.merge import merge
from merganser.method.registry import get_method
from merganser.record.format import record_text
from merganser.record.verification import verify
from tests.engine.interrupting import BLOCK
from tests.making import SIDE_FILES, llama, llama_config, make_recipe, read_json, read_model, write_llamas, write_model


def test_outputs_are_listed_with_size_and_sha256(tmp_path):
    result = merge(
        make_recipe("linear", write_llamas(tmp_path), parameters={"weight": 1}), tmp_path / "out", out_shard_size=9000
    )
    listed = {entry["file"]: (entry["bytes"], entry["sha256"]) for entry in result.record["outputs"]}
    found = {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in result.out.iterdir()
        if path.name != "merge.json"
    }
    assert len(found) > 4
    assert listed == found
    assert verify(result.out).ok
    assert read_json(result.out, "merge.json") == result.record


def test_what_it_says_of_the_run(tmp_path):
    paths = write_llamas(tmp_path)
    recipe = make_recipe("ties", paths[1:], paths[0], {"weight": 0.5, "density": 0.5})
    record = merge(recipe, tmp_path / "out", seed=3, threads=2).record
    own = llama(0)
    assert record["method"] == "ties"
    assert record["seed"] == 3
    assert record["donor"] == str(paths[0])
    assert record["models"] == [str(path) for path in paths]
    assert record["tensors"] == len(own)
    assert record["parameters"] == sum(tensor.numel() for tensor in own.values())
    assert record["dtypes"] == ["float32"]
    assert record["versions"]["merganser"] == merganser.__version__
    assert record["versions"]["torch"] == torch.__version__
    assert "method ties" in record["versions"]
    assert record["workers"] == 2
    assert record["continued"] is False
    assert record["timings"]["seconds"] >= record["timings"]["merge_seconds"] > 0
    assert yaml.safe_load(record["recipe"]) == recipe


def hashes(record):
    return {entry["path"]: entry["xxh3_128_of_tensors"] for entry in record["inputs"]}


def test_hashes_of_inputs_are_those_of_the_inputs_alone(tmp_path, small_blocks):
    """Not of the method, the threads, the layout of the output, or whether the run was continued."""
    # rows of one block and more among them
    paths = [
        write_model(
            tmp_path / f"m{i}", {**llama(i), "long": torch.randn(5, 300), "vector": torch.randn(300)}, shards=1 + i % 2
        )
        for i in range(3)
    ]
    runs = [
        ("linear", {"weight": 1}, {}),
        ("ties", {"weight": 1, "density": 0.5}, {"threads": 1}),
        ("ties", {"weight": 1, "density": 0.5}, {"threads": 3, "out_shard_size": 3000}),
        ("della", {"weight": 1, "density": 0.5}, {"out_shard_size": 1}),
        ("model_stock", {}, {}),
        ("karcher", {}, {}),
    ]
    assert {get_method(name).scope for name, _, _ in runs} == {"element", "row"}
    found = []
    for i, (method, parameters, options) in enumerate(runs):
        base = None if get_method(method).base == "unused" else paths[0]
        models = paths if base is None else paths[1:]
        found.append(
            hashes(merge(make_recipe(method, models, base, parameters), tmp_path / f"out{i}", **options).record)
        )
    assert len(found[0]) == 4
    assert len(set(found[0].values())) == 4
    assert all(other == found[0] for other in found)


def test_a_changed_bit_changes_the_hash_of_its_file_alone(tmp_path):
    paths = write_llamas(tmp_path)
    recipe = make_recipe("linear", paths, parameters={"weight": 1})
    before = hashes(merge(recipe, tmp_path / "a").record)
    file = paths[0] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    after = hashes(merge(recipe, tmp_path / "b").record)
    assert {path for path in before if before[path] != after[path]} == {str(file)}


def test_files_that_were_read_in_part_say_so(tmp_path):
    paths = write_llamas(tmp_path, 2)
    piece = {"sources": [{"model": str(paths[0]), "layer_range": [0, 1]}]}
    record = merge({"merge_method": "passthrough", "slices": [piece]}, tmp_path / "out").record
    (entry,) = record["inputs"]
    assert (entry["tensors"], entry["tensors_read"]) == (21, 12)
    assert entry["model"] == str(paths[0])
    assert entry["bytes"] == (paths[0] / "model.safetensors").stat().st_size


def test_the_summary_by_layer_and_role(tmp_path, small_blocks):
    """Relative distances of models and merge from the base, over all tensors of a layer and role."""
    base = {
        "model.embed_tokens.weight": torch.full((32, 16), 2.0),
        "model.layers.0.mlp.up_proj.weight": torch.full((24, 16), 1.0),
        "model.layers.0.mlp.down_proj.weight": torch.full((3, 8), 2.0),
        "model.layers.0.input_layernorm.weight": torch.zeros(16),
        "model.layers.1.mlp.up_proj.weight": torch.full((4, 4), 3.0),
        "position_ids": torch.arange(3),
    }
    first = {**base, "model.layers.0.mlp.up_proj.weight": torch.full((24, 16), 2.0)}
    second = {**base, "model.layers.0.mlp.down_proj.weight": torch.full((3, 8), 0.0)}
    paths = [write_model(tmp_path / f"m{i}", own) for i, own in enumerate((base, first, second))]
    record = merge(make_recipe("task_arithmetic", paths[1:], paths[0], {"weight": 0.5}), tmp_path / "out").record
    summary = {(entry["layer"], entry["role"]): entry for entry in record["layers"]}
    # distances are measured on the first block of a tensor, which counts for all of it
    assert BLOCK < 24 * 16
    norm = (24 * 16 * 1.0 + 24 * 4.0) ** 0.5
    mlp = summary[0, "mlp"]
    assert (mlp["tensors"], mlp["parameters"]) == (2, 24 * 16 + 24)
    assert mlp["models"] == pytest.approx([(24 * 16) ** 0.5 / norm, (24 * 4.0) ** 0.5 / norm])
    assert mlp["merged"] == pytest.approx((24 * 16 * 0.25 + 24 * 1.0) ** 0.5 / norm)
    assert (summary[1, "mlp"]["models"], summary[1, "mlp"]["merged"]) == ([0, 0], 0)
    assert summary[None, "embedding"]["merged"] == 0
    # a base of zeros has no relative distance
    assert "merged" not in summary[0, "norm"]
    assert sum(entry["tensors"] for entry in summary.values()) == len(base)
    assert sum(entry["parameters"] for entry in summary.values()) == sum(t.numel() for t in base.values())


def test_the_card_has_the_recipe(tmp_path):
    paths = write_llamas(tmp_path)
    text = f"""# how it was made
merge_method: linear
models:
  - model: {paths[1]}
  - model: {paths[0]}  # second
parameters: {{weight: 1}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    card = (merge(tmp_path / "recipe.yaml", tmp_path / "my-merge").out / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "merganser"]}
    assert "\n# my-merge\n" in body
    assert f"```yaml\n{text}```\n" in body
    assert "other files are those of `m1`" in body
    # the package is not published, so a link to it would lead nowhere
    assert "](http" not in card


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "Config, tokenizer and other files are those of `m0`."),
        (
            {"tokenizer_source": "m1"},
            "Config and other files are those of `m0`.\n"
            "chat_template.jinja, tokenizer.json and tokenizer_config.json are those of `m1`.",
        ),
        (
            {"chat_template": "chatml"},
            "Config and other files are those of `m0`.\nchat_template.jinja is that of the recipe.",
        ),
        ({"chat_template": "auto"}, "Config and other files are those of `m0`.\nchat_template.jinja is that of `m1`."),
    ],
)
def test_plan_and_card_name_the_model_that_gives_each_file(tmp_path, extra, said):
    paths = write_llamas(tmp_path, 2)
    for path in paths:
        for name, text in SIDE_FILES.items():
            if name.startswith(("token", "chat", "gen")):
                (path / name).write_text(text)
    (paths[1] / "tokenizer_config.json").write_text('{"a": 1}')
    if extra.get("chat_template") == "auto":
        (paths[0] / "chat_template.jinja").unlink()
    if "tokenizer_source" in extra:
        extra = {"tokenizer_source": str(paths[1])}
    result = merge(make_recipe("linear", paths, parameters={"weight": 1}, **extra), tmp_path / "out")
    assert f"\n{said}\n\n## Recipe" in (result.out / "README.md").read_text()
    plan = merganser.plan(make_recipe("linear", paths, parameters={"weight": 1}, **extra))
    origins = {name: model for model, names in plan.origins.items() for name in names}
    assert origins.keys() == {path.name for path in result.out.iterdir()} - {
        "README.md",
        "merge.json",
        "model.safetensors",
    }
    for name, model in origins.items():
        if name in SIDE_FILES and model != "the recipe":
            assert (result.out / name).read_bytes() == (tmp_path / model / name).read_bytes()


def test_a_recipe_with_a_fence_does_not_end_the_block(tmp_path):
    paths = write_llamas(tmp_path, 2)
    recipe = make_recipe("linear", paths, parameters={"weight": 1}, chat_template="{% if x %}\n```\n{% endif %}")
    card = (merge(recipe, tmp_path / "out").out / "README.md").read_text()
    assert card.count("\n~~~~~~") == 2


def test_sampling_starts_at_the_first_element_of_large_tensors(tmp_path, monkeypatch, small_blocks):
    """The record's distances are measured on the beginning of a tensor, not on all of it."""
    monkeypatch.setattr("merganser.engine.stream.sample.SAMPLE", 8)
    base, other = torch.ones(1024), torch.ones(1024)
    other[:8] = 3
    other[8:] = 100
    paths = [write_model(tmp_path / f"m{i}", {"w": own}, llama_config()) for i, own in enumerate((base, other))]
    record = merge(make_recipe("task_arithmetic", paths[1:], paths[0], {"weight": 0.5}), tmp_path / "out").record
    (entry,) = record["layers"]
    assert entry["models"] == [pytest.approx(2.0)]
    assert entry["merged"] == pytest.approx(1.0)
    assert read_model(tmp_path / "out")["w"][-1] == 50.5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_text_of_a_record_is_its_json(record: dict[str, Any]) -> None:
    assert json.loads(record_text(record)) == record


def test_what_a_record_lists_has_a_line_for_each_entry() -> None:
    record = {"seed": 0, "layers": [{"n": [1, 2]}, {"n": []}], "movement": {"total": 1, "tensors": [{"a": {"b": 1}}]}}
    assert record_text(record) == (
        '{\n "seed": 0,\n "layers": [\n  {"n": [1, 2]},\n  {"n": []}\n ],\n'
        ' "movement": {\n  "total": 1,\n  "tensors": [\n   {"a": {"b": 1}}\n  ]\n }\n}\n'
    )
