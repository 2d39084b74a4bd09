"""Layers that do not fit on each other are refused; what is stacked is what transformers loads."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from merganser import merge, plan
from merganser.checkpoint import open_checkpoint
from merganser.engine.alignment.alignment import Member
from merganser.engine.alignment.loadable import check_layers_load
from merganser.engine.alignment.meta_model import build_model
from merganser.errors import CheckpointError, RecipeError, UnsupportedError
from merganser.recipe import ModelReference
from tests.engine.alignment.small_models import change, loads_fully, save
from tests.engine.alignment.test_slices import make_sliced, piece
from tests.making import assert_equal, read_json, read_model


def stack(*pieces, method="passthrough", **keys):
    return make_sliced(method, [piece(one) for one in pieces], **keys)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"hidden_size": 64}, r"embed_tokens\.weight|input_layernorm\.weight is \[64\], but is \[32\]"),
        ("llama", {"intermediate_size": 96}, r"mlp\.down_proj\.weight is \[32, 96\], but is \[32, 64\]"),
        ("llama", {"num_key_value_heads": 4}, r"self_attn\.k_proj\.weight is \[32, 32\], but is \[16, 32\]"),
        ("qwen2", {}, r"self_attn\.k_proj\.bias is \[16\], but is missing"),
        ("qwen3", {}, r"self_attn\.k_norm\.weight is \[8\], but is missing"),
        ("mixtral", {}, r"block_sparse_moe\.\S+ is \[.*\], but is missing"),
    ],
)
def test_layers_of_another_kind_are_refused_by_name(tmp_path, name, settings, message):
    own = save(tmp_path / "own", "llama", head_dim=8)
    other = save(tmp_path / "other", name, head_dim=8, **settings)
    # the strange layers lie between, so that what is outside the layers is all the donor's
    with pytest.raises(CheckpointError, match=message) as raised:
        plan(stack((own, 0, 2), (other, 1, 3), (own, 2, 4)))
    assert str(own) in str(raised.value)
    assert str(other) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_layers_of_the_same_kind_load(tmp_path):
    own, other = save(tmp_path / "own", "qwen2"), save(tmp_path / "others", "qwen2", num_hidden_layers=6)
    out = merge(stack((own, 0, 3), (other, 2, 6)), tmp_path / "out").out
    model = loads_fully(out)
    expected = other.joinpath("model.safetensors")
    assert torch.equal(
        model.model.layers[6].mlp.up_proj.weight, load_file(expected)["model.layers.5.mlp.up_proj.weight"]
    )
    assert read_json(out, "config.json")["num_hidden_layers"] == 7


def test_first_and_last_slice_with_other_vocabularies_are_refused(tmp_path):
    small, large = save(tmp_path / "small", "llama", vocab_size=204), save(tmp_path / "large", "llama", vocab_size=206)
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight: vocabularies differ: \[206, 32\] in .*large, \[204, 32"
    ):
        plan(stack((small, 0, 2), (large, 2, 4)))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: vocabularies differ: \[204, 32\] in .*small"):
        plan(stack((small, 0, 2), (large, 2, 4), base=None) | {"base_model": str(large), "merge_method": "passthrough"})


def test_an_encoder_decoder_model_names_its_stacks(tmp_path):
    model = save(tmp_path / "t5", "t5")
    with pytest.raises(
        RecipeError, match=r"several stacks of layers, encoder\.block \(3 layers\), decoder\.block \(3 lay"
    ):
        plan(stack((model, 0, 2)))


def with_prediction_layers(folder, count=1):
    """DeepSeek appends its prediction layers to the list of layers."""
    save(folder, "deepseek_v3", num_nextn_predict_layers=count)
    tensors = load_file(folder / "model.safetensors")
    for extra in range(count):
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            tensors[name.replace("layers.3.", f"layers.{4 + extra}.")] = tensors[name] + 1 + extra
        tensors[f"model.layers.{4 + extra}.eh_proj.weight"] = torch.full((32, 64), float(extra))
    return change(folder, tensors, num_nextn_predict_layers=count)


@pytest.mark.parametrize("layers", [[(0, 4), (2, 4)], [(0, 2), (3, 4)]], ids=["deeper", "shallower"])
def test_prediction_layers_behind_the_last_layer_stay_behind_it(tmp_path, layers):
    model = with_prediction_layers(tmp_path / "model", 2)
    out = merge(stack(*((model, *ends) for ends in layers)), tmp_path / "out").out
    total = sum(last - first for first, last in layers)
    written, own = read_model(out), read_model(model)
    config = read_json(out, "config.json")
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (total, 2)
    for extra in range(2):
        behind, before = f"model.layers.{total + extra}.", f"model.layers.{4 + extra}."
        expected = {name.replace(before, behind): tensor for name, tensor in own.items() if name.startswith(before)}
        assert_equal({name: tensor for name, tensor in written.items() if name.startswith(behind)}, expected)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert len(model.model.layers) == total


def test_a_stack_of_prediction_layers_of_its_own_is_kept(tmp_path):
    """Qwen3.5 has them beside the model."""
    model = save(tmp_path / "model", "qwen2")
    tensors = load_file(model / "model.safetensors")
    tensors |= {
        "mtp.fc.weight": torch.ones(32, 64),
        "mtp.layers.0.mlp.up_proj.weight": torch.ones(64, 32),
        "mtp.layers.0.input_layernorm.weight": torch.ones(32),
        "mtp.norm.weight": torch.ones(32),
    }
    change(model, tensors, mtp_num_hidden_layers=1)
    out = read_model(merge(stack((model, 0, 4), (model, 1, 4)), tmp_path / "out").out)
    for name in tensors:
        if name.startswith("mtp."):
            assert torch.equal(out[name], tensors[name])
    assert len({name.split(".")[2] for name in out if name.startswith("model.layers.")}) == 7


def test_dense_layers_behind_experts_are_refused_before_anything_is_written(tmp_path):
    model = save(tmp_path / "model", "deepseek_v3")
    with pytest.raises(
        UnsupportedError, match="first_k_dense_replace=2: dense layers would follow layers with experts"
    ):
        merge(stack((model, 0, 3), (model, 0, 4)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_of_the_donor_that_is_like_it_describes_a_layer_of_a_deeper_model(tmp_path):
    """Layer 1 of the one has experts, where the donor's layer 1 is dense."""
    own = save(tmp_path / "own", "qwen3_moe", mlp_only_layers=[1])
    other = save(tmp_path / "other", "qwen3_moe", mlp_only_layers=[0], num_hidden_layers=6)
    out = merge(stack((own, 0, 2), (other, 0, 2), (other, 5, 6)), tmp_path / "out").out
    assert read_json(out, "config.json")["mlp_only_layers"] == [1, 2]
    loads_fully(out)


def test_a_config_that_asks_for_other_kinds_of_layers_is_refused(tmp_path):
    """Which kind a place has by its class only transformers knows."""
    folder = save(tmp_path / "model", "qwen3_moe", mlp_only_layers=[1])
    donor = Member.of(ModelReference(str(folder)), open_checkpoint(str(folder)))
    config = {**donor.checkpoint.config, "num_hidden_layers": 3, "mlp_only_layers": [0]}
    check_layers_load(config, donor, [1, 2, 3])
    wrong = {**config, "mlp_only_layers": [1]}
    with pytest.raises(
        CheckpointError, match=r"layer 0: mlp\.down_proj\.weight is written with \[32, 64\] and would not"
    ):
        check_layers_load(wrong, donor, [1, 2, 3])
    with pytest.raises(CheckpointError, match="transformers would build 2 layers, 3 were chosen"):
        check_layers_load({**config, "num_hidden_layers": 2}, donor, [1, 2, 3])
    with pytest.raises(CheckpointError, match=r"transformers cannot build the model: \w+: "):
        check_layers_load({**config, "hidden_size": "wide"}, donor, [1, 2, 3])
    # a class of the checkpoint's own code, or of nobody
    check_layers_load({**wrong, "architectures": ["Unheard"]}, donor, [1, 2, 3])


@pytest.mark.parametrize(("settings", "built"), [({}, 100), ({"layer_types": ["full_attention"] * 4}, 120)])
def test_of_thousands_of_equal_layers_some_are_built(tmp_path, monkeypatch, settings, built):
    """Unless the config says something of every layer."""
    model = save(tmp_path / "model", "qwen3")
    config = {key: value for key, value in read_json(model, "config.json").items() if key != "layer_types"}
    (model / "config.json").write_text(json.dumps(config | settings))
    counts = []

    def build(config):
        counts.append(config["num_hidden_layers"])
        return build_model(config)

    monkeypatch.setattr("merganser.engine.alignment.loadable.build_model", build)
    planned = plan(stack(*[(model, i % 4, i % 4 + 1) for i in range(120)]))
    assert planned.config["num_hidden_layers"] == 120
    assert counts == [4, built]


def test_without_transformers_structure_alone_decides(tmp_path, monkeypatch):
    model = save(tmp_path / "model", "llama")
    wider = save(tmp_path / "wider", "llama", intermediate_size=96)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert plan(stack((model, 0, 4), (model, 2, 4))).config["num_hidden_layers"] == 6
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight is"):
        plan(stack((model, 0, 2), (wider, 2, 4)))


def test_layers_of_other_kinds_with_the_same_shapes_are_stacked_and_said(tmp_path):
    first, second = save(tmp_path / "a", "gemma2"), save(tmp_path / "bb", "gemma2")
    slices = [piece((first, 0, 2), (second, 1, 3)), piece((second, 2, 4))]
    warnings = plan(make_sliced("linear", slices, parameters={"weight": 1.0})).warnings
    assert [each for each in warnings if "different kinds" in each] == [
        "layers of different kinds are merged, since their tensors have the same shapes: layer 0 of the output is "
        f"sliding_attention, as layer 0 of {first}, and layer 1 of {second} is full_attention; and 1 more layer"
    ]
    slices = [piece((first, 0, 2), (second, 2, 4)), piece((second, 2, 4))]
    warnings = plan(make_sliced("linear", slices, parameters={"weight": 1.0})).warnings
    assert not any("different kinds" in each for each in warnings)
