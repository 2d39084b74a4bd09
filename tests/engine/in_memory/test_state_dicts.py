"""Merging in memory, as inside a training loop."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from merganser.engine.in_memory.state_dicts import merge_state_dicts
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import CheckpointError, NonFiniteError, ParameterError, RecipeError, UnsupportedError
from merganser.method.registry import get_method
from tests.making import assert_equal


def make(seed, *, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[2].num_batches_tracked += 7
    return model.to(dtype)


@pytest.mark.parametrize(
    ("method", "with_base", "parameters"),
    [
        ("linear", False, {"weight": 1.0}),
        ("linear", False, {"weight": [0.2, 0.8], "normalize": False}),
        ("ties", True, {"weight": 0.5, "density": [0.3, 0.6], "lambda_": 0.7}),
        ("dare_ties", True, {"weight": 0.5, "density": 0.5}),
        ("slerp", True, {"t": 0.25}),
    ],
)
def test_modules(method, with_base, parameters):
    base, *models = (make(seed).state_dict() for seed in range(2 if method == "slerp" else 3))
    base = base if with_base else None
    found = merge_state_dicts(method, models, base=base, seed=5, **parameters)
    named = {name.rstrip("_"): value for name, value in parameters.items()}
    for name in models[0]:
        if name.endswith("num_batches_tracked"):
            assert found[name].item() == 7
            continue
        own = None if base is None else base[name]
        expected = merge_tensor(get_method(method), own, [model[name] for model in models], named, name=name, seed=5)
        assert torch.equal(found[name], expected)
    loaded = make(9)
    loaded.load_state_dict(found)
    assert_equal(loaded.state_dict(), found)
    assert loaded[1](torch.ones(2, 8)).isfinite().all()


def test_nothing_is_shared_with_the_inputs_or_tracked():
    models = [dict(make(seed).named_parameters()) for seed in range(2)]
    before = {name: tensor.detach().clone() for name, tensor in models[0].items()}
    found = merge_state_dicts("linear", models, weight=1.0)
    for name, tensor in found.items():
        assert not tensor.requires_grad
        tensor.zero_()
        assert torch.equal(models[0][name], before[name])


def test_buffers_are_copied_not_shared():
    models = [make(seed).state_dict() for seed in range(2)]
    found = merge_state_dicts("linear", models, weight=1.0)
    found["2.num_batches_tracked"] += 1
    assert models[0]["2.num_batches_tracked"] == 7


def test_dtypes():
    first, second = make(0, dtype=torch.bfloat16).state_dict(), make(1).state_dict()
    assert merge_state_dicts("linear", [first, second], weight=1.0)["1.weight"].dtype == torch.float32
    assert merge_state_dicts("linear", [first, first], weight=1.0)["1.weight"].dtype == torch.bfloat16
    wide = merge_state_dicts("linear", [first, first], weight=1.0, dtype=torch.float64)
    assert wide["1.weight"].dtype == torch.float64
    assert wide["2.num_batches_tracked"].dtype == torch.int64


def changed(state, **changes):
    return {**state, **{name.replace("__", "."): value for name, value in changes.items()}}


def test_errors():
    state = make(0).state_dict()
    with pytest.raises(CheckpointError, match=r"state dict 1: different names: extra, more"):
        merge_state_dicts("linear", [state, changed(state, extra=torch.ones(1), more=torch.ones(1))], weight=1)
    with pytest.raises(CheckpointError, match=r"1\.weight: shapes differ: \[8, 8\], \[8, 9\]"):
        merge_state_dicts("linear", [state, {**state, "1.weight": torch.ones(8, 9)}], weight=1)
    mixed = [state, {**state, "1.bias": torch.ones(8, dtype=torch.int64)}]
    for order in (mixed, mixed[::-1]):
        with pytest.raises(CheckpointError, match=r"1\.bias: .*float32.*int64|1\.bias: .*int64.*float32"):
            merge_state_dicts("linear", order, weight=1)
    with pytest.raises(NonFiniteError, match=r"1\.bias"):
        merge_state_dicts("linear", [state, {**state, "1.bias": torch.full((8,), float("nan"))}], weight=1)
    with pytest.raises(ParameterError, match=r"unknown parameter 'wieght' of linear\. Did you mean 'weight'"):
        merge_state_dicts("linear", [state, state], wieght=1)
    with pytest.raises(ParameterError, match="weight needs 2 values, one per model, got 3"):
        merge_state_dicts("linear", [state, state], weight=[1, 2, 3])
    with pytest.raises(RecipeError, match="unknown merge method 'liner'"):
        merge_state_dicts("liner", [state, state], weight=1)
    with pytest.raises(UnsupportedError, match="cut is measured over the whole model"):
        merge_state_dicts("ties", [state, state], base=state, weight=1, density=0.5, trim_over="model")
    with pytest.raises(ValueError, match="got no base"):
        merge_state_dicts("ties", [state, state], weight=1)
    with pytest.raises(ValueError, match="got a base"):
        merge_state_dicts("linear", [state, state], base=state, weight=1)
    with pytest.raises(ValueError, match="models"):
        merge_state_dicts("linear", [], weight=1)
    with pytest.raises(ParameterError, match="integers must be 'equal', 'largest' or 'first', got 'mean'"):
        merge_state_dicts("linear", [state, state], weight=1, integers="mean")


def test_integers():
    state = make(0).state_dict()
    counted = changed(state, **{"2__num_batches_tracked": torch.tensor(9)})
    for order in ([state, counted], [counted, state]):
        assert merge_state_dicts("linear", order, weight=1)["2.num_batches_tracked"] == 9
        first = merge_state_dicts("linear", order, weight=1, integers="first")["2.num_batches_tracked"]
        assert first == order[0]["2.num_batches_tracked"]
    state["ids"], counted["ids"] = torch.tensor([1, 5]), torch.tensor([2, 3])
    with pytest.raises(
        CheckpointError, match=r"ids: this buffer of torch.int64 differs .*'largest' or 'first' chooses"
    ):
        merge_state_dicts("linear", [state, counted], weight=1)
    assert merge_state_dicts("linear", [state, counted], weight=1, integers="largest")["ids"].tolist() == [2, 5]


def test_modules_and_generators():
    models = [make(seed) for seed in range(2)]
    expected = merge_state_dicts("linear", [model.state_dict() for model in models], weight=1.0)
    assert_equal(merge_state_dicts("linear", (model for model in models), weight=1.0), expected)


def test_prefixes_of_frameworks():
    first, second, base = (make(seed).state_dict() for seed in range(3))
    expected = merge_state_dicts("task_arithmetic", [first, second], base=base, weight=1.0)
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in first.items()}
    merged = merge_state_dicts("task_arithmetic", [wrapped, second], base=base, weight=1.0)
    assert_equal(merged, {f"_orig_mod.module.{name}": tensor for name, tensor in expected.items()})
    merged = merge_state_dicts("task_arithmetic", [second, wrapped], base=base, weight=1.0)
    assert list(merged) == list(second)


def test_what_is_not_a_state_dict():
    state = make(0).state_dict()
    with pytest.raises(TypeError, match="models: expected a list of state dicts, got one; put it into a list"):
        merge_state_dicts("linear", state, weight=1)
    with pytest.raises(TypeError, match="models: expected a list of state dicts, got one; put it into a list"):
        merge_state_dicts("linear", make(0), weight=1)
    with pytest.raises(TypeError, match="models: expected a list of state dicts, got int"):
        merge_state_dicts("linear", 3, weight=1)
    with pytest.raises(TypeError, match=r"model 2: expected a state dict .* or a module, got str"):
        merge_state_dicts("linear", [state, "model.pt"], weight=1)
    with pytest.raises(TypeError, match=r"base: .* got float for 'lr'"):
        merge_state_dicts("ties", [state], base={"lr": 0.1}, weight=1, density=0.5)
    nested = {"model_state_dict": state, "epoch": 3}
    with pytest.raises(TypeError, match=r"model 1: .* pass what is under 'model_state_dict'"):
        merge_state_dicts("linear", [nested, state], weight=1)


def test_dtensors(tmp_path):
    """Two ranks, as FSDP2 shards a model: uneven shards, one method per way of merging, bits as unsharded."""
    subprocess.run([sys.executable, "-m", "tests.engine.sharded", str(tmp_path)], check=True, timeout=120)
