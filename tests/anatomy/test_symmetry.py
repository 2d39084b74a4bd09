"""The permutations that leave a model's output unchanged: held against models of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from merganser.anatomy import infer_anatomy
from merganser.anatomy.symmetry import UNITS, Units, find_units
from merganser.errors import UnsupportedError
from tests.anatomy.permuting import permute, random_orders

_TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("Llama", {}),
    "a head for each query, biases": ("Llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "one group": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "norms of heads": ("Qwen3", {"head_dim": 8}),
    "norms over all heads": ("Olmo2", {}),
    "sliding window, tied": ("Gemma2", {"head_dim": 8, "sliding_window": 5}),
    "parallel blocks": ("Phi", {"head_dim": 8, "hidden_size": 32, "partial_rotary_factor": 0.5}),
    "stacked matrices": ("Phi3", {}),
    "interleaved heads": ("GPTNeoX", {}),
    "input axis first": ("GPT2", {}),
    "ungated": ("Starcoder2", {}),
}


def tiny(name: str, keys: dict[str, Any]) -> Any:
    """A model in float64, with random norms and biases; norms compute in float32 all the same."""
    config = getattr(transformers, f"{name}Config")(**{**_TINY, **keys})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


def units_of(model: Any, tensors: dict[str, torch.Tensor]) -> list[Units]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = model.config.to_dict()
    return find_units(shapes, config, infer_anatomy(shapes, config))


@pytest.mark.parametrize("case", FAMILIES)
def test_permuting_leaves_logits_unchanged(case: str) -> None:
    model = tiny(*FAMILIES[case])
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    units = units_of(model, tensors)
    layers = model.config.num_hidden_layers
    assert [each.kind for each in units].count("residual") == 1
    assert [each.kind for each in units].count("mlp") == [each.kind for each in units].count("heads") == layers
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = model(tokens).logits
        for kind in UNITS:
            chosen = [each for each in units if each.kind == kind]
            moved = permute(tensors, chosen, random_orders(chosen, 1))
            assert any(not torch.equal(moved[name], tensors[name]) for name in tensors)
            model.load_state_dict(moved)
            torch.testing.assert_close(model(tokens).logits, before, rtol=1e-5, atol=1e-5)


def test_grouped_queries_move_with_their_group() -> None:
    shapes = {
        "model.embed_tokens.weight": (40, 24),
        "model.layers.0.self_attn.q_proj.weight": (24, 24),
        "model.layers.0.self_attn.k_proj.weight": (12, 24),
    }
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    _, heads = find_units(shapes, config, infer_anatomy(shapes, config))
    assert (heads.size, heads.uses[0].width) == (2, 6)
    assert heads.inner is not None
    assert heads.inner.size == 4
    orders = random_orders([heads], 3)
    assert (orders[heads.inner.name].reshape(2, 2) // 2 == orders[heads.name][:, None]).all()
    assert sorted(orders[heads.inner.name]) == [0, 1, 2, 3]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = {
    "a family": ({"model_type": "mixtral"}, {}, "model_type 'mixtral': it is not known which permutations"),
    "no family": ({"model_type": None}, {}, "model_type 'None'"),
    "no heads": ({"num_attention_heads": None}, {}, "no number of heads"),
    "a tensor of a layer": (
        {},
        {"model.layers.0.self_attn.sinks": (4,)},
        r"self_attn.sinks \(shape \[4\], 4 elements\)",
    ),
    "experts": ({}, {"model.layers.0.mlp.experts.0.up_proj.weight": (8, 24)}, "experts.0.up_proj.weight"),
    "a tensor elsewhere": ({}, {"model.adapter.weight": (5, 7)}, "model.adapter.weight"),
    "heads of another size": ({}, {"model.layers.0.self_attn.k_proj.weight": (10, 24)}, "k_proj.weight"),
    "another width": ({}, {"model.layers.0.mlp.up_proj.weight": (8, 23)}, "up_proj.weight"),
    "a matrix where a vector belongs": ({}, {"model.layers.0.input_layernorm.weight": (24, 24)}, "input_layernorm"),
    "odd halves": ({"model_type": "phi3"}, {"model.layers.0.mlp.gate_up_proj.weight": (9, 24)}, "gate_up_proj"),
    "groups that do not divide": ({"num_key_value_heads": 3}, {}, "o_proj"),
    "hidden units that differ": (
        {},
        {"model.layers.0.mlp.up_proj.weight": (8, 24), "model.layers.0.mlp.down_proj.weight": (24, 9)},
        r"layers.0 mlp: its tensors have different numbers of hidden units: \[8, 9\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name(case: str) -> None:
    keys, more, message = REFUSED[case]
    shapes = {"model.embed_tokens.weight": (40, 24), "model.layers.0.self_attn.o_proj.weight": (24, 24)}
    shapes |= more
    config = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        **keys,
    }
    with pytest.raises(UnsupportedError, match=message):
        find_units(shapes, config, infer_anatomy(shapes, config))


def test_buffers_are_left_alone() -> None:
    shapes = {"model.embed_tokens.weight": (40, 24), "model.layers.0.self_attn.rotary_emb.inv_freq": (3,)}
    config = {"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 1}
    (residual,) = find_units(shapes, config, infer_anatomy(shapes, config))
    assert [use.tensor for use in residual.uses] == ["model.embed_tokens.weight"]
    assert np.prod(residual.size) == 24
