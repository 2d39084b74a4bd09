"""Recipes that align models: permuted copies are recovered, and nothing else moves."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merganser.anatomy import infer_anatomy
from merganser.anatomy.symmetry import UNITS, Units, find_units
from merganser.checkpoint import Reader, open_checkpoint
from merganser.checkpoint.derived.derived import read_elements, read_whole
from merganser.checkpoint.derived.permuted import permuted
from merganser.engine.either import the_model
from merganser.engine.merge import merge, plan
from merganser.engine.permutation.assignment import assign, assign_groups
from merganser.engine.record import fingerprint
from merganser.errors import MergeError
from tests.anatomy.permuting import permute, random_orders
from tests.making import assert_equal, read_json, read_model, write_model

VOCAB, HIDDEN, INNER, HEAD = 50, 24, 20, 6
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
Tensors = dict[str, torch.Tensor]


def weights(seed: int, config: Mapping[str, Any] = CONFIG) -> Tensors:
    """A Llama with two groups of two queries."""
    draw = torch.Generator().manual_seed(seed)
    keys = config["num_key_value_heads"] * HEAD
    layer = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (config["intermediate_size"], HIDDEN),
        "mlp.up_proj": (config["intermediate_size"], HIDDEN),
        "mlp.down_proj": (HIDDEN, config["intermediate_size"]),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCAB, HIDDEN)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)}
    return {f"{name}.weight": torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def units_of(tensors: Tensors, kinds: Sequence[str] = UNITS) -> list[Units]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return [each for each in find_units(shapes, CONFIG, infer_anatomy(shapes, CONFIG)) if each.kind in kinds]


def permuted_copy(tensors: Tensors, kinds: Sequence[str], seed: int = 5) -> Tensors:
    units = units_of(tensors, kinds)
    return permute(tensors, units, random_orders(units, seed))


def recipe(*models: Path, units: Sequence[str] = UNITS, **keys: Any) -> dict[str, Any]:
    listed = [{"model": str(path)} for path in models]
    given = {"merge_method": "linear", "parameters": {"weight": 0.5}, "align": {"units": list(units)}}
    return {**given, "models": listed, **keys}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "a", weights(0), CONFIG)
    return tmp_path


@pytest.mark.parametrize("kinds", [["mlp"], ["heads"], ["mlp", "heads"], ["residual"], list(UNITS)], ids="-".join)
def test_a_model_merged_with_its_permuted_copy_is_the_model(folder: Path, kinds: list[str]) -> None:
    write_model(folder / "b", permuted_copy(weights(0), kinds), CONFIG, shards=2)
    result = merge(recipe(folder / "a", folder / "b", units=kinds), folder / "out")
    assert_equal(read_model(folder / "out"), weights(0))
    (moved,) = result.record["permutation"]["models"]
    assert list(moved["moved"]) == [kind for kind in UNITS if kind in kinds]
    assert all(0 < each["units"] <= each["of"] for each in moved["moved"].values())
    assert read_json(folder / "out", "merge.json")["permutation"] == result.record["permutation"]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "out"]


OTHER_LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "phi3": (
        {},
        {
            "input_layernorm.weight": (HIDDEN,),
            "self_attn.qkv_proj.weight": (2 * HIDDEN, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            "mlp.gate_up_proj.weight": (2 * INNER, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, INNER),
        },
    ),
    "gpt_neox": (
        {"num_key_value_heads": None},
        {
            "input_layernorm.bias": (HIDDEN,),
            "attention.query_key_value.weight": (3 * HIDDEN, HIDDEN),
            "attention.query_key_value.bias": (3 * HIDDEN,),
            "attention.dense.weight": (HIDDEN, HIDDEN),
            "mlp.dense_h_to_4h.weight": (INNER, HIDDEN),
            "mlp.dense_4h_to_h.weight": (HIDDEN, INNER),
            "mlp.dense_4h_to_h.bias": (HIDDEN,),
        },
    ),
    "gpt2": (
        {"num_key_value_heads": None, "n_head": 4},
        {
            "ln_1.weight": (HIDDEN,),
            "attn.c_attn.weight": (HIDDEN, 3 * HIDDEN),
            "attn.c_attn.bias": (3 * HIDDEN,),
            "attn.c_proj.weight": (HIDDEN, HIDDEN),
            "mlp.c_fc.weight": (HIDDEN, INNER),
            "mlp.c_proj.weight": (INNER, HIDDEN),
        },
    ),
}


@pytest.mark.parametrize("family", OTHER_LAYOUTS)
def test_stacked_and_interleaved_matrices_are_read_in_the_order_of_the_reference(tmp_path: Path, family: str) -> None:
    keys, layer = OTHER_LAYOUTS[family]
    config = CONFIG | {"model_type": family, "num_hidden_layers": 1} | keys
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    units = find_units(shapes, config, infer_anatomy(shapes, config))
    write_model(tmp_path / "a", tensors, config)
    write_model(tmp_path / "b", permute(tensors, units, random_orders(units, 4)), config)
    merge(recipe(tmp_path / "a", tmp_path / "b"), tmp_path / "out")
    assert_equal(read_model(tmp_path / "out"), tensors)


def test_without_align_a_permuted_copy_is_averaged_as_it_is(folder: Path) -> None:
    copy = permuted_copy(weights(0), ["mlp"])
    write_model(folder / "b", copy, CONFIG)
    written = recipe(folder / "a", folder / "b")
    del written["align"]
    record = merge(written, folder / "out").record
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(read_model(folder / "out")[name], (weights(0)[name] + copy[name]) / 2)
    assert record["permutation"] is None


def test_fine_tunes_of_one_base_stay_as_they_are(folder: Path) -> None:
    """Also where the models are stored in bfloat16; the result is what it is without `align`, bit for bit."""
    for seed in (1, 2):
        noise = weights(seed)
        tuned = {name: (tensor + 0.1 * noise[name]).bfloat16() for name, tensor in weights(0).items()}
        write_model(folder / f"m{seed}", tuned, CONFIG)
    task = {"merge_method": "task_arithmetic", "base_model": str(folder / "a"), "parameters": {"weight": 0.5}}
    written = recipe(folder / "m1", folder / "m2", **task)
    record = merge(written, folder / "out").record
    assert [each["model"] for each in record["permutation"]["models"]] == [str(folder / "m1"), str(folder / "m2")]
    assert all(kind["units"] == 0 for each in record["permutation"]["models"] for kind in each["moved"].values())
    del written["align"]
    merge(written, folder / "plain")
    assert_equal(read_model(folder / "out"), read_model(folder / "plain"))


def test_to_names_the_model_that_keeps_its_order(folder: Path) -> None:
    copy = permuted_copy(weights(0), UNITS)
    write_model(folder / "b", copy, CONFIG)
    written = recipe(folder / "a", folder / "b")
    written["align"]["to"] = str(folder / "b")
    merge(written, folder / "out")
    assert_equal(read_model(folder / "out"), copy)


def test_models_from_other_starts_come_nearer_and_the_result_repeats(folder: Path) -> None:
    """The inner product with the reference grows, and one unit moves with all of its tensors."""
    other = weights(9)
    write_model(folder / "b", other, CONFIG)
    record = merge(recipe(folder / "a", folder / "b"), folder / "out").record
    merged, first = read_model(folder / "out"), weights(0)
    aligned = {name: 2 * tensor - first[name] for name, tensor in merged.items()}

    def alike(model: Tensors) -> float:
        return sum(float((model[name] * first[name]).sum()) for name in first)

    assert alike(aligned) > alike(other) + 100
    again = merge(recipe(folder / "a", folder / "b"), folder / "again").record
    assert again["permutation"] == record["permutation"]
    assert_equal(read_model(folder / "again"), merged)


def test_the_plan_counts_what_moves(folder: Path) -> None:
    write_model(folder / "b", permuted_copy(weights(0), ["mlp"]), CONFIG)
    found = the_model(plan(recipe(folder / "a", folder / "b"))).permutation
    assert found is not None
    moved = found.models[0].moved
    assert moved["residual"] == (0, HIDDEN)
    assert moved["heads"] == (0, 2 * 4)
    assert moved["mlp"][0] > 0
    assert moved["mlp"][1] == 2 * INNER


def test_a_stage_is_aligned_when_it_is_made(folder: Path) -> None:
    write_model(folder / "b", permuted_copy(weights(0), UNITS), CONFIG)
    text = f"""
name: swapped
merge_method: passthrough
models: [{{model: {folder / "b"}}}]
---
merge_method: linear
parameters: {{weight: 0.5}}
models: [{{model: {folder / "a"}}}, {{model: swapped}}]
align: {{to: base, units: [mlp, heads, residual]}}
"""
    planned = the_model(plan(text)).permutation
    assert planned is not None
    assert planned.models[0].moved == {}
    merge(text, folder / "out")
    assert_equal(read_model(folder / "out"), weights(0))


def test_a_killed_run_takes_the_permutations_that_were_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merganser.engine.permutation import match

    write_model(folder / "b", permuted_copy(weights(0), UNITS), CONFIG)
    written = recipe(folder / "a", folder / "b", units=["mlp", "heads"])
    improve = match._Matcher.improve
    done: list[str] = []

    def stop_at_the_third(self: Any, group: Units, *more: Any) -> bool:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(group.name)
        return improve(self, group, *more)

    monkeypatch.setattr(match._Matcher, "improve", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        merge(written, folder / "out")
    (kept,) = (folder / ".out.permutations").glob("*.jsonl")
    kept.write_bytes(kept.read_bytes() + b'{"check":"cut off')
    again: list[str] = []

    def note(self: Any, group: Units, *more: Any) -> bool:
        again.append(group.name)
        return improve(self, group, *more)

    monkeypatch.setattr(match._Matcher, "improve", note)
    merge(written, folder / "out")
    assert len(again) == 2
    assert not set(done) & set(again)
    assert not (folder / ".out.permutations").exists()
    monkeypatch.undo()
    merge(written, folder / "once")
    assert_equal(read_model(folder / "out"), read_model(folder / "once"))


def test_a_run_with_another_permutation_is_not_continued(folder: Path) -> None:
    write_model(folder / "b", permuted_copy(weights(0), ["mlp"]), CONFIG)
    found = the_model(plan(recipe(folder / "a", folder / "b")))
    assert fingerprint(found, {}) == fingerprint(replace(found), {})
    assert fingerprint(found, {}) != fingerprint(replace(found, permutation=None), {})


def test_a_permuted_tensor_is_read_from_any_byte(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = open_checkpoint(str(folder / "a")).tensors[name]
    draw = np.random.default_rng(0)
    rows, columns = draw.permutation(INNER), draw.permutation(HIDDEN)
    expected = weights(0)[name][rows][:, columns]
    found = permuted(tensor, {0: rows, 1: columns})
    with Reader() as reader:
        assert torch.equal(read_whole(reader, found), expected)
        assert torch.equal(read_elements(reader, found, 5, 131), expected.reshape(-1)[5:131])
        assert torch.equal(read_whole(reader, permuted(tensor, {1: columns})), weights(0)[name][:, columns])
    assert permuted(tensor, {}) is tensor


def test_assignments_are_the_best_ones() -> None:
    scores = np.array([[3.0, 2.9, 0.0], [2.8, 0.0, 0.0], [0.0, 0.0, 0.1]], np.float32)
    assert assign(scores).tolist() == [1, 0, 2]
    assert assign(np.zeros((3, 3), np.float32)).tolist() == [0, 1, 2]
    # heads 0 and 1 are one group; its heads are found swapped in the other group
    heads = np.zeros((4, 4), np.float32)
    heads[0, 3] = heads[1, 2] = heads[2, 0] = heads[3, 1] = 1
    outer, inner = assign_groups(np.zeros((2, 2), np.float32), heads)
    assert outer.tolist() == [1, 0]
    assert inner.tolist() == [3, 2, 0, 1]
    # keys and values that speak more strongly for their own group keep it
    outer, inner = assign_groups(np.eye(2, dtype=np.float32) * 5, heads)
    assert outer.tolist() == [0, 1]


def test_without_scipy_the_message_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies and fine-tunes are aligned without it."""
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    write_model(folder / "b", permuted_copy(weights(0), ["mlp"]), CONFIG)
    assert the_model(plan(recipe(folder / "a", folder / "b"))).permutation is not None
    with pytest.raises(MergeError, match=r"needs SciPy: pip install 'merganser\[align\]'"):
        plan(recipe(folder / "a", _other(folder, "c")))


def _other(folder: Path, name: str = "b", **keys: Any) -> Path:
    config = CONFIG | keys
    return write_model(folder / name, weights(1, config), config)


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"align": {"unit": ["mlp"]}}, "align: unknown key 'unit'. Did you mean 'units'?"),
    "no mapping": ({"align": "weights"}, "align: expected a mapping with the keys to, by, units, data, got 'weights'"),
    "unknown units": ({"align": {"units": ["head"]}}, "'head' is not known. Did you mean 'heads'?"),
    "no units": ({"align": {"units": []}}, "the list is empty; write at least one entry, or leave the key out"),
    "experts by activations": (
        {"align": {"by": "activations", "units": "experts", "data": "a.txt"}},
        "experts are compared by weights only",
    ),
    "units twice": ({"align": {"units": ["mlp", "mlp"]}}, "names 'mlp' twice"),
    "no data": ({"align": {"by": "activations"}}, "'by: activations' runs the models on text; give 'data' here"),
    "weights with data": ({"align": {"data": "a.txt"}}, "weights are compared without data; add 'by: activations'"),
    "empty data": ({"align": {"by": "activations", "data": {}}}, "data: names no data; give files or a dataset"),
    "unknown key of data": (
        {"align": {"by": "activations", "data": {"file": "a.txt"}}},
        "unknown key 'file'. Did you mean 'files'?",
    ),
    "labels": (
        {"align": {"by": "activations", "data": {"files": "a.txt", "labels": "sampled"}}},
        "labels: units are compared without a loss",
    ),
    "data that are not there": (
        {"align": {"by": "activations", "data": "texts.txt"}},
        "texts.txt: there is no such file",
    ),
    "by what": ({"align": {"by": "weight"}}, "'weight' is not known. Did you mean 'weights'?"),
    "a model of another recipe": ({"align": {"to": "elsewhere"}}, "elsewhere is not a model of this recipe; it has"),
    "statistics": (
        {"merge_method": "regmean", "base_model": "a", "align": {}},
        "the statistics from data that regmean takes are of the models as they are stored",
    ),
    "sidecars": (
        {"merge_method": "tall_masks", "base_model": "a", "align": {}},
        "tall_masks stores what restores each model",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_recipes(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    keys, message = MALFORMED[case]
    monkeypatch.chdir(folder)
    listed = [{"model": "a"}, {"model": str(_other(folder))}]
    written = {"merge_method": "model_stock", "base_model": "a", "models": listed, **keys}
    with pytest.raises(MergeError) as caught:
        merge(written, folder / "out")
    assert message in str(caught.value)
    assert "align" in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_models_that_do_not_fit(folder: Path) -> None:
    wide = _other(folder, "wide", intermediate_size=INNER + 2)
    with pytest.raises(MergeError, match=r"down_proj.weight: shapes differ: \[24, 20\] in .*a, \[24, 22\] in .*wide"):
        plan(recipe(folder / "a", wide))
    mixture = _other(folder, "mixture", model_type="mixtral")
    with pytest.raises(MergeError, match=r"align: .*mixture: model_type 'mixtral': it is not known which permutations"):
        plan(recipe(folder / "a", mixture))
    broken = weights(1)
    broken["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    write_model(folder / "broken", broken, CONFIG)
    with pytest.raises(MergeError, match=r"broken: model.layers.1 mlp: a model holds NaN or infinity here"):
        plan(recipe(folder / "a", folder / "broken", units=["mlp"]))
    with pytest.raises(MergeError, match=r"residual: comparing 24 units takes 16.7 KB, and 100 bytes are allowed"):
        plan(recipe(folder / "a", _other(folder)), max_memory=100)
    pieces = [{"sources": [{"model": str(folder / "a"), "layer_range": [0, 2]}]}]
    with pytest.raises(MergeError, match="only whole models can be aligned"):
        plan({"merge_method": "passthrough", "slices": pieces, "align": {}})
    parts = {"text_decoder": {"models": [{"model": str(folder / "a")}]}}
    with pytest.raises(MergeError, match="only whole models can be aligned"):
        plan({"merge_method": "passthrough", "modules": parts, "align": {}})
