"""Models are built from configs that anyone may have written: nothing is fetched, and nothing takes for ever."""

from __future__ import annotations

import pytest
import torch
import transformers

from merganser.engine.alignment.meta_model import build_model
from tests.anatomy.architectures import real


def config(**settings):
    return {**real("llama").config, **settings}


def test_the_model_has_names_and_shapes_and_no_memory():
    model = build_model(config())
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == real("llama").shapes
    assert {tensor.device for tensor in model.parameters()} == {torch.device("meta")}


@pytest.mark.parametrize(
    "settings",
    [
        {"architectures": None},
        {"architectures": ["Unheard"]},
        {"architectures": ["pipeline"]},
        {"architectures": ["BertModel"]},
        {"auto_map": {"AutoModelForCausalLM": "own.Own"}},
        {"use_pretrained_backbone": True},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 4000, "num_experts": 4000},
        {"max_position_embeddings": 10**12},
        {"num_labels": 10**9},
        {"text_config": {"num_layers": 10**9}},
        {"attention_types": [[["global"], 2 * 10**9]]},
        {"vocab_size": 10**12},
    ],
)
def test_what_is_not_tried(settings):
    assert build_model(config(**settings)) is None


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_config_names_are_not_fetched(key, monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("fetched")

    monkeypatch.setattr("transformers.modeling_utils.is_kernel", lambda name: bool(name) and "/" in name and fetch())
    model = build_model(config(**{key: "someone/kernel"}))
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.config._attn_implementation == "eager"


def test_a_limit_without_end_is_no_size():
    found = {**real("mamba").config, "time_step_limit": [0.0, float("inf")]}
    assert isinstance(build_model(found), transformers.MambaForCausalLM)


def test_wide_experts_are_tried():
    model = build_model({**real("qwen2_moe").config, "shared_expert_intermediate_size": 100_000})
    assert model.state_dict()["model.layers.0.mlp.shared_expert.up_proj.weight"].shape == (100_000, 32)


def test_a_config_that_transformers_refuses_says_why():
    assert str(build_model(config(hidden_size="wide"))).startswith("StrictDataclass")


def test_sizes_of_convolutions_stay():
    found = real("mamba")
    model = build_model({**found.config, "conv_kernel": 7})
    assert model.state_dict()["backbone.layers.0.mixer.conv1d.weight"].shape[-1] == 7
