"""Rows: all weights of one output unit, of matrices, convolutions and packed experts."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.blocks import block_shape, block_step, working_shape
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.merge import merge, plan
from merganser.method.registry import get_method
from tests.engine.matrix_toys import rank_one
from tests.making import assert_equal, llama, llama_config, make_recipe, read_model, register, write_model

EXPERTS, ROWS, COLUMNS = 5, 24, 70
CONFIG = llama_config() | {"num_experts": EXPERTS}
PACKED = "model.layers.0.mlp.experts.gate_up_proj"
CONVOLUTION = "model.layers.1.conv1d.weight"

BY_ROW = [
    ("breadcrumbs", {"weight": 0.5, "density": 0.3, "gamma": 0.1, "by": "row"}),
    ("model_stock", {"filter_wise": True}),
    ("nuslerp", {"weight": [0.4, 0.6], "nuslerp_flatten": False, "nuslerp_row_wise": False}),
]


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def mixture(seed):
    """A llama with packed experts and a convolution."""
    return {**llama(seed), PACKED: draw(seed, EXPERTS, ROWS, COLUMNS), CONVOLUTION: draw(seed + 9, 16, 8, 4)}


@pytest.mark.parametrize(
    ("shape", "role", "expected"),
    [
        ((5, 24, 70), "expert", (120, 70)),
        ((5, 24, 70), "conv", (5, 24, 70)),
        ((5, 24, 70), None, (5, 24, 70)),
        ((24, 70), "expert", (24, 70)),
        ((5, 24), "mlp", (5, 24)),
        ((7,), "norm", (7,)),
        ((), "other", ()),
        ((5, 0, 70), "expert", (0, 70)),
        ((5, 24, 0), "expert", (120, 0)),
    ],
)
def test_shapes(shape, role, expected):
    assert working_shape(shape, "row", role) == expected
    for scope in ("element", "tensor", "matrix"):
        assert working_shape(shape, scope, role) == shape


def test_blocks_of_packed_experts_are_whole_rows():
    shape = working_shape((EXPERTS, ROWS, COLUMNS), "row", "expert")
    assert block_step(shape, "row", 1000) == 14 * COLUMNS
    assert block_shape(shape, "row", 14 * COLUMNS) == (14, COLUMNS)
    convolution = working_shape((16, 8, 4), "row", "conv")
    assert block_step(convolution, "row", 70) == 2 * 32
    assert block_shape(convolution, "row", 64) == (2, 32)


@pytest.mark.parametrize(("name", "parameters"), BY_ROW)
def test_packed_experts_are_merged_like_experts_of_their_own(name, parameters):
    method = get_method(name)
    tensors = [draw(seed, EXPERTS, ROWS, COLUMNS) for seed in range(3)]
    packed = merge_tensor(method, tensors[0], tensors[1:], parameters, role="expert", block=1000)
    apart = [merge_tensor(method, base, models, parameters) for base, *models in zip(*tensors, strict=True)]
    assert torch.equal(packed, torch.stack(apart))
    # not as if each expert were one row
    assert not torch.equal(packed, merge_tensor(method, tensors[0], tensors[1:], parameters))


@pytest.mark.parametrize(("name", "parameters"), BY_ROW)
def test_a_convolution_has_a_row_for_each_output(name, parameters):
    method = get_method(name)
    base, *models = (draw(seed, 16, 8, 4) for seed in range(3))
    found = merge_tensor(method, base, models, parameters, role="conv")
    flat = merge_tensor(method, base.flatten(1), [model.flatten(1) for model in models], parameters)
    assert torch.equal(found.flatten(1), flat)


@pytest.mark.parametrize(("name", "parameters"), [*BY_ROW, ("della", {"weight": 0.5, "density": 0.5})])
def test_a_merge_of_packed_experts(tmp_path, small_blocks, name, parameters):
    models = [mixture(seed) for seed in range(3)]
    paths = [write_model(tmp_path / f"m{seed}", model, CONFIG) for seed, model in enumerate(models)]
    weight = parameters.get("weight")
    listed = [(path, {"weight": weight[i]} if isinstance(weight, list) else {}) for i, path in enumerate(paths[1:])]
    shared = {key: value for key, value in parameters.items() if not isinstance(value, list)}
    recipe = make_recipe(name, listed, paths[0], shared)
    planned = {tensor.name: tensor for tensor in plan(recipe).tensors}
    assert (planned[PACKED].role, planned[PACKED].working_shape) == ("expert", (EXPERTS * ROWS, COLUMNS))
    assert planned[PACKED].size > planned[PACKED].block
    assert planned[CONVOLUTION].role == "conv"
    merged = read_model(merge(recipe, tmp_path / "out", seed=3, threads=2).out)
    expected = {
        key: merge_tensor(
            get_method(name), *(models[0][key], [m[key] for m in models[1:]]), parameters, name=key, seed=3, role=t.role
        )
        for key, t in planned.items()
    }
    assert_equal(merged, expected)


def test_hashes_of_packed_tensors_are_the_same_for_every_method(tmp_path, small_blocks, monkeypatch):
    """Whether its blocks are elements, rows of all experts, or experts."""
    register(monkeypatch, rank_one=rank_one)
    # several experts fit into a block, too
    small = {"model.layers.1.mlp.experts.down_proj": draw(7, EXPERTS, 3, 10)}
    paths = [write_model(tmp_path / f"m{seed}", mixture(seed) | small, CONFIG) for seed in range(3)]
    runs = [
        ("task_arithmetic", {"weight": 0.5}),
        ("ties", {"weight": 0.5, "density": 0.5}),
        BY_ROW[0],
        ("rank_one", {}),
    ]
    found = []
    for name, parameters in runs:
        record = merge(make_recipe(name, paths[1:], paths[0], parameters), tmp_path / name).record
        found.append([entry["xxh3_128_of_tensors"] for entry in record["inputs"]])
    assert len(set(found[0])) == 3
    assert all(other == found[0] for other in found)
