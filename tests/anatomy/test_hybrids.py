"""Hybrid architectures: layers of several kinds, sliced by their keys alone, with the lists and rules of their configs."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from merganser.anatomy import infer_anatomy, slice_config
from tests.anatomy.architectures import IDS, MOE, TEXT, Real, load_config, names_in_memory
from tests.anatomy.test_slicing import sliced_names

LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
STATE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, **IDS}

HYBRIDS = {
    "qwen3_next": {
        **TEXT,
        **MOE,
        **LINEAR,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "qwen3_5_text": {**TEXT, **LINEAR},
    "granitemoehybrid": {
        **TEXT,
        **MAMBA,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
    },
    "bamba": {**TEXT, **MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**TEXT, **MAMBA, "mamba_d_ssm": 64},
    "mamba2": {**STATE, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "falcon_mamba": {**STATE, "state_size": 4},
    "nemotron_h": {
        **TEXT,
        "layers_block_type": ["mamba", "attention", "mamba", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "recurrent_gemma": {**TEXT, "lru_width": 32, "head_dim": 8, "attention_window_size": 16},
    "lfm2_moe": {
        **TEXT,
        **MOE,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_dense_layers": 1,
    },
}


def build(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def hybrid(name):
    """Return names and shapes of a hybrid, and its config, with what the file says of its class."""
    model = build(transformers.AutoConfig.for_model(name, **HYBRIDS[name]))
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    return Real(names_in_memory(model), config, {})


@pytest.mark.parametrize("name", HYBRIDS)
def test_transformers_builds_the_sliced_hybrid(name, tmp_path):
    model = build(transformers.AutoConfig.for_model(name, **HYBRIDS[name]))
    config = json.loads(model.config.to_json_string(use_diff=False))
    shapes = names_in_memory(model)
    anatomy = infer_anatomy(shapes, config)
    layers = [0, 1, 2, 1, 2, 3]
    sliced = slice_config(config, layers, anatomy=anatomy)
    assert names_in_memory(build(load_config(sliced.config, tmp_path))) == sliced_names(anatomy, shapes, layers)
    assert sliced.warnings == []
