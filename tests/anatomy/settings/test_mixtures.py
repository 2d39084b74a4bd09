"""The numbers of experts in a config.json."""

from __future__ import annotations

from typing import Any

import pytest

from merganser.anatomy.experts import find_experts
from merganser.anatomy.settings.mixtures import chosen_experts, number_of_experts, odd_routing, with_experts

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "ernie": {"moe_num_experts": 8, "moe_k": 2},
    "hunyuan": {"num_experts": 8, "moe_topk": 2},
    "nested": {"text_config": {"num_experts": 8, "num_experts_per_tok": 2}, "num_experts_per_tok": 7},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_read_and_changed(name: str) -> None:
    config = CONFIGS[name]
    assert (number_of_experts(config), chosen_experts(config), odd_routing(config)) == (8, 2, None)
    found = with_experts(config, 4, 1)
    assert found is not None
    inner, before = found.get("text_config", found), config.get("text_config", config)
    assert inner == dict(zip(before, (4, 1), strict=True))
    assert odd_routing(with_experts(config, 4, 5) or {}) is not None


def test_a_config_without_them() -> None:
    assert with_experts({"hidden_size": 8}, 4, 1) is None
    # the default of the family is no longer right
    assert with_experts({"num_experts": 8}, 1, 1) == {"num_experts": 1, "num_experts_per_tok": 1}
    assert odd_routing({"num_experts_per_tok": 9}) is None
    assert odd_routing({"num_experts": 1, "num_experts_per_tok": 2}) is None


@pytest.mark.parametrize("chosen", [0, 9, "two", True])
def test_numbers_that_contradict_each_other(chosen: Any) -> None:
    config = {"num_experts": 8, "num_experts_per_tok": chosen}
    assert odd_routing(config) == f"num_experts_per_tok is {chosen!r}, and there are 8 experts: it must be 1 to 8"


def test_experts_as_granite_names_them() -> None:
    home = "model.layers.0.block_sparse_moe"
    shapes = {
        f"{home}.input_linear.weight": (4, 96, 32),
        f"{home}.output_linear.weight": (4, 32, 48),
        f"{home}.router.layer.weight": (4, 32),
        "model.layers.0.shared_mlp.input_linear.weight": (32, 32),
    }
    [found] = find_experts(shapes, {"num_local_experts": 4})
    assert found.packed == (f"{home}.input_linear.weight", f"{home}.output_linear.weight")
    assert (found.size, found.router, found.single) == (4, (f"{home}.router.layer.weight",), ())
