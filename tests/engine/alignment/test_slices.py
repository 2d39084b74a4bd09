"""Layers of several models stacked: which tensor is made from which, and with which parameters."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.merge import merge, plan
from merganser.errors import CheckpointError, RecipeError
from merganser.method.registry import get_method
from tests.making import (
    assert_equal,
    llama,
    llama_config,
    make_recipe,
    read_json,
    read_model,
    write_llamas,
    write_model,
)

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def piece(*sources, **keys):
    """A slice of (model, first, end[, parameters])."""
    listed = [
        {"model": str(model), "layer_range": [first, end], **({"parameters": rest[0]} if rest else {})}
        for model, first, end, *rest in sources
    ]
    return {"sources": listed, **keys}


def make_sliced(method, slices, base=None, parameters=None, **keys):
    recipe = {"merge_method": method, "slices": list(slices), **keys}
    if base is not None:
        recipe["base_model"] = str(base)
    if parameters:
        recipe["parameters"] = parameters
    return recipe


def layer(tensors, source, target):
    """The tensors of a layer under the names of another."""
    old, new = f"model.layers.{source}.", f"model.layers.{target}."
    return {name.replace(old, new): tensor for name, tensor in tensors.items() if name.startswith(old)}


def layers_of(recipe):
    """Parameters of each tensor of the plan."""
    return {tensor.name: tensor.parameters for tensor in plan(recipe).tensors}


def test_passthrough_stacks_layers(tmp_path):
    first, second = write_llamas(tmp_path, 2, layers=3)
    stacked = [(first, 0), (first, 1), (second, 1), (second, 2), (second, 0)]
    recipe = make_sliced("passthrough", [piece((first, 0, 2)), piece((second, 1, 3)), piece((second, 0, 1))])
    out = merge(recipe, tmp_path / "out").out
    models = {first: read_model(first), second: read_model(second)}
    expected = {EMBEDDING: models[first][EMBEDDING], NORM: models[second][NORM], HEAD: models[second][HEAD]}
    for i, (model, index) in enumerate(stacked):
        expected |= layer(models[model], index, i)
    assert_equal(read_model(out), expected)
    assert read_json(out, "config.json")["num_hidden_layers"] == 5
    model = AutoModelForCausalLM.from_pretrained(out)
    assert_equal(model.state_dict(), expected)
    made = model.generate(torch.arange(5).unsqueeze(0), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 9)


def test_lists_per_layer_are_those_of_the_donors_layers(tmp_path):
    config = {**llama_config(4), "model_type": "qwen2", "layer_types": ["w", "x", "y", "z"], "max_window_layers": 4}
    first = write_model(tmp_path / "a", llama(0, 4), config)
    second = write_model(tmp_path / "b", llama(1, 4), {**config, "layer_types": ["0", "1", "2", "3"]})
    slices = [piece((first, 0, 1)), piece((second, 0, 2, {"weight": 1}), (first, 2, 4))]
    found = plan(make_sliced("linear", slices, parameters={"weight": 1}))
    assert found.config["layer_types"] == ["w", "y", "z"]
    assert found.config["num_hidden_layers"] == 3


def test_slices_of_two_models_with_a_schedule(tmp_path):
    first, second = write_llamas(tmp_path, 2, layers=5)
    t = [
        {"filter": "self_attn", "value": [0, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0]},
        {"value": [0.2, 0.6]},
    ]
    recipe = make_sliced("slerp", [piece((first, 0, 5), (second, 0, 5))], first, {"t": t})
    found = layers_of(recipe)
    attention = [found[f"model.layers.{i}.self_attn.q_proj.weight"]["t"] for i in range(5)]
    assert attention == [0, 0.25, 0.5, 0.75, 1]
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"]["t"] for i in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    norms = [found[f"model.layers.{i}.input_layernorm.weight"]["t"] for i in range(5)]
    assert norms == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    # the first value before the layers, the last one behind them
    assert (found[EMBEDDING]["t"], found[NORM]["t"], found[HEAD]["t"]) == (0.2, 0.6, 0.6)
    by_peer = layers_of({**recipe, "compat": "mergekit"})
    assert (by_peer[EMBEDDING]["t"], by_peer[NORM]["t"], by_peer[HEAD]["t"]) == (0.2, 0.2, 0.2)
    assert by_peer["model.layers.2.mlp.up_proj.weight"]["t"] == 0.5
    out = read_model(merge(recipe, tmp_path / "out").out)
    a, b = read_model(first), read_model(second)
    for name, tensor in out.items():
        expected = merge_tensor(get_method("slerp"), a[name], [b[name]], {"t": found[name]["t"]})
        assert torch.equal(tensor, expected)


def test_models_with_a_schedule_equal_one_slice_over_everything(tmp_path):
    first, second = write_llamas(tmp_path, 2, layers=3)
    parameters = {"t": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": [0.3, 0.9]}]}
    whole = make_recipe("slerp", [first, second], first, parameters)
    sliced = make_sliced("slerp", [piece((first, 0, 3), (second, 0, 3))], first, parameters)
    assert layers_of(whole) == layers_of(sliced)
    assert_equal(
        read_model(merge(whole, tmp_path / "a").out),
        read_model(merge(sliced, tmp_path / "b").out),
    )


def test_parameters_of_slices_and_sources(tmp_path):
    first, second = write_llamas(tmp_path, 2, layers=4)
    slices = [
        piece((first, 0, 2, {"weight": [0.1, 0.2]}), (second, 0, 2)),
        piece((first, 2, 4), (second, 1, 3, {"weight": 0.7}), parameters={"weight": 0.3}),
    ]
    found = layers_of(make_sliced("linear", slices, parameters={"weight": 0.5, "normalize": False}))
    weight = {name: own["weight"] for name, own in found.items()}
    assert weight[EMBEDDING] == (0.1, 0.5)
    assert weight["model.layers.0.mlp.up_proj.weight"] == (0.1, 0.5)
    assert weight["model.layers.1.mlp.up_proj.weight"] == (0.2, 0.5)
    assert weight["model.layers.2.mlp.up_proj.weight"] == (0.3, 0.7)
    assert weight[NORM] == weight[HEAD] == (0.3, 0.7)


def test_filters_of_sources_see_the_names_in_that_model(tmp_path):
    """Layer 2 of the output is layer 0 of the source."""
    (first,) = write_llamas(tmp_path, 1, layers=2)
    scale = [{"filter": "layers.0.mlp", "value": 0.0}, {"value": 1.0}]
    slices = [piece((first, 0, 2)), piece((first, 0, 2, {"scale": scale}))]
    found = layers_of(make_sliced("passthrough", slices))
    zeros = {name for name, own in found.items() if own["scale"] == (0.0,)}
    assert zeros == {f"model.layers.2.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_a_repeated_layer_without_output_projections_changes_nothing(tmp_path):
    """Block expansion: the deeper model computes, bit for bit, what the shallow one does."""
    (first,) = write_llamas(tmp_path, 1, layers=3)
    silent = {"scale": [{"filter": "o_proj", "value": 0}, {"filter": "down_proj", "value": 0}]}
    slices = [piece((first, 0, 2)), piece((first, 1, 2, silent)), piece((first, 2, 3)), piece((first, 2, 3, silent))]
    out = merge(make_sliced("passthrough", slices), tmp_path / "out").out
    scales = {name: own["scale"] for name, own in layers_of(make_sliced("passthrough", slices)).items()}
    expected = {f"model.layers.{i}.{part}.weight" for i in (2, 4) for part in ("self_attn.o_proj", "mlp.down_proj")}
    assert {name for name, scale in scales.items() if scale == (0,)} == expected
    tokens = torch.arange(12).view(2, 6)
    shallow, deep = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (first, out))
    assert torch.equal(deep, shallow)
    loud = merge(make_sliced("passthrough", [piece((first, 0, 3)), piece((first, 2, 3))]), tmp_path / "loud").out
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(loud)(tokens).logits, shallow)


def test_a_base_that_is_not_listed_lends_the_same_layers(tmp_path):
    base, first, second = write_llamas(tmp_path, 3, layers=4)
    listed = [piece((base, 1, 3), (first, 1, 3), (second, 1, 3))]
    unlisted = [piece((first, 1, 3), (second, 1, 3))]
    found = [
        read_model(merge(make_sliced("ties", slices, base, {"weight": 0.5}), tmp_path / name).out)
        for name, slices in (("a", listed), ("b", unlisted))
    ]
    assert_equal(found[0], found[1])
    a, b, c = (read_model(path) for path in (base, first, second))
    name = "model.layers.1.mlp.up_proj.weight"
    inputs = [model[name.replace("1", "2", 1)] for model in (a, b, c)]
    assert torch.equal(found[0][name], merge_tensor(get_method("ties"), inputs[0], inputs[1:], {"weight": 0.5}))


def test_a_base_whose_layers_are_not_clear(tmp_path):
    base, first, second = write_llamas(tmp_path, 3, layers=4)
    recipe = make_sliced("ties", [piece((first, 0, 2), (second, 1, 3))], base, {"weight": 0.5})
    with pytest.raises(RecipeError, match=r"slices\[0\].*list the base .* among the sources"):
        plan(recipe)


def test_layers_that_hold_different_tensors(tmp_path):
    own = llama(1)
    own["model.layers.1.mlp.up_proj.bias"] = torch.zeros(24)
    paths = [write_model(tmp_path / f"m{i}", t, llama_config()) for i, t in enumerate((llama(0), own))]
    expected = f"layer 1 of {paths[1]} and layer 0 of {paths[0]} hold different tensors: mlp.up_proj.bias"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        plan(make_sliced("linear", [piece((paths[0], 0, 1), (paths[1], 1, 2))], parameters={"weight": 1}))


def test_computed_buffers_in_the_layers_of_one_model_are_left_out(tmp_path):
    own = llama(1)
    for i in range(2):
        own[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
    paths = [write_model(tmp_path / f"m{i}", t, llama_config()) for i, t in enumerate((llama(0), own))]
    for order in (paths, paths[::-1]):
        sources = [(path, 0, 2) for path in order]
        names = layers_of(make_sliced("linear", [piece(*sources)], parameters={"weight": 1}))
        assert names.keys() == llama(0).keys()


@pytest.mark.parametrize("where", ["before", "after"])
def test_tensors_outside_the_layers_that_only_one_model_has(tmp_path, where):
    own = llama(1)
    name = "model.embed_tokens_norm.weight" if where == "after" else "model.extra_embeddings.weight"
    own[name] = torch.zeros(16)
    paths = [write_model(tmp_path / f"m{i}", t, llama_config()) for i, t in enumerate((llama(0), own))]
    with pytest.raises(CheckpointError, match=rf"1 only in {re.escape(str(paths[1]))}: {re.escape(name)}"):
        plan(make_sliced("linear", [piece(*((path, 0, 2) for path in paths))], parameters={"weight": 1}))


@pytest.mark.parametrize(
    ("ties", "is_tied"),
    [((True, True), True), ((True, False), False), ((False, True), False), ((False, False), False)],
)
def test_ties_of_stacked_models(tmp_path, ties, is_tied):
    models = [llama(i, head=not tied) for i, tied in enumerate(ties)]
    paths = [
        write_model(tmp_path / f"m{i}", own, llama_config(tied=tied))
        for i, (own, tied) in enumerate(zip(models, ties, strict=True))
    ]
    recipe = make_sliced("passthrough", [piece((paths[0], 0, 2)), piece((paths[1], 0, 2))])
    out = merge(recipe, tmp_path / "out").out
    found = read_model(out)
    assert read_json(out, "config.json")["tie_word_embeddings"] is is_tied
    assert torch.equal(found[EMBEDDING], models[0][EMBEDDING])
    assert (HEAD in found) is not is_tied
    if not is_tied:
        assert torch.equal(found[HEAD], models[1].get(HEAD, models[1][EMBEDDING]))
    state = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert_equal(state, {**found, HEAD: found.get(HEAD, found[EMBEDDING])})
    assert any("the output's head is its embedding" in warning for warning in plan(recipe).warnings) is is_tied


def test_a_tied_model_with_a_copy_of_the_head_stays_tied(tmp_path):
    own = llama(0, head=False)
    own[HEAD] = own[EMBEDDING].clone()
    path = write_model(tmp_path / "m", own, llama_config(tied=True))
    found = plan(make_sliced("passthrough", [piece((path, 0, 2)), piece((path, 1, 2))]))
    assert HEAD not in {tensor.name for tensor in found.tensors}
    assert found.config["tie_word_embeddings"] is True


def test_ranges_are_checked_against_the_models(tmp_path):
    (path,) = write_llamas(tmp_path, 1)
    with pytest.raises(RecipeError, match=r"slices\[0\]\.sources\[0\].*\[0, 3\] is too long: .* has 2 layers"):
        plan(make_sliced("passthrough", [piece((path, 0, 3))]))


def test_a_model_without_layers_cannot_be_sliced(tmp_path):
    path = write_model(tmp_path / "m", {"w": torch.zeros(3)})
    with pytest.raises(RecipeError, match="has no numbered layers, so it cannot be sliced"):
        plan(make_sliced("passthrough", [piece((path, 0, 1))]))


def test_a_filter_that_matches_nothing_is_told(tmp_path):
    paths = write_llamas(tmp_path, 2)
    recipe = make_recipe("linear", paths, parameters={"weight": [{"filter": "atention", "value": 2}, {"value": 1}]})
    assert any("atention" in warning for warning in plan(recipe).warnings)


def test_a_statistic_over_the_model_needs_the_same_parameters_everywhere(tmp_path):
    paths = write_llamas(tmp_path, 3)
    density = [{"filter": "norm", "value": 1.0}, {"value": 0.5}]
    parameters = {"weight": 1, "density": density, "trim_over": "model"}
    with pytest.raises(RecipeError, match="ties measures cut over the whole model, so its parameters cannot differ"):
        plan(make_recipe("ties", paths[1:], paths[0], parameters))
    mixed = [{"filter": "lm_head", "value": "tensor"}, {"value": "model"}]
    with pytest.raises(RecipeError, match="cannot differ between tensors"):
        plan(make_recipe("ties", paths[1:], paths[0], {"weight": 1, "density": 0.5, "trim_over": mixed}))
