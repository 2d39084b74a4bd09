"""Running averages, as inside a training loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import merganser
from merganser import EMA, LAWA, Average
from merganser.errors import CheckpointError, NonFiniteError, ParameterError
from merganser.methods.ema import ema as ema_method
from tests.making import assert_equal


def states(count, dtype=torch.float32):
    torch.manual_seed(5)
    return [nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)).to(dtype).state_dict() for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_average_is_that_of_linear(dtype):
    average, given = Average(), states(5, dtype)
    for state in given:
        average.update(state)
    assert_equal(average.state_dict(), merganser.merge_state_dicts("linear", given, weight=1.0))
    assert average.count == 5


def test_weights():
    average, given = Average(), states(3)
    for state, weight in zip(given, (1.0, 2.0, 5.0), strict=True):
        average.update(state, weight)
    assert_equal(average.state_dict(), merganser.merge_state_dicts("linear", given, weight=[1.0, 2.0, 5.0]))


def test_the_result_does_not_change_with_later_updates():
    for average in (Average(), EMA(0.5), LAWA(2)):
        first, second = states(2)
        average.update(first)
        before = average.state_dict()
        kept = {name: tensor.clone() for name, tensor in before.items()}
        average.update(second)
        assert_equal(before, kept)
        assert not torch.equal(average.state_dict()["0.weight"], before["0.weight"])


def test_inputs_are_neither_changed_nor_shared():
    for average in (Average(), EMA(0.5), LAWA(3)):
        given = states(2)
        copies = [{name: tensor.clone() for name, tensor in state.items()} for state in given]
        for state in given:
            average.update(state)
        average.state_dict()["0.weight"].zero_()
        for state, copy in zip(given, copies, strict=True):
            assert_equal(state, copy)
            state["0.weight"].zero_()
        assert average.state_dict()["0.weight"].abs().sum() > 0


def test_ema_is_the_recursion():
    average, given = EMA(0.75), states(4)
    for state in given:
        average.update(state)
    expected = given[0]["0.weight"].double()
    for state in given[1:]:
        expected = 0.75 * expected + 0.25 * state["0.weight"].double()
    assert torch.allclose(average.state_dict()["0.weight"].double(), expected, atol=1e-7)
    beta = torch.tensor(0.75)
    merged = ema_method([state["0.weight"] for state in given], beta=beta, bias_correction=False)
    assert torch.allclose(average.state_dict()["0.weight"], merged, atol=1e-7)


def test_lawa_is_the_mean_of_the_latest():
    average, given = LAWA(3), states(5)
    for position, state in enumerate(given):
        average.update(state)
        latest = given[max(0, position - 2) : position + 1]
        assert_equal(average.state_dict(), merganser.merge_state_dicts("lawa", latest, k=3))


def test_modules_wrappers_and_counters():
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    average = Average()
    for counter in (3, 9):
        model[1].num_batches_tracked.fill_(counter)
        average.update(model)
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    average.update(wrapped)
    result = average.state_dict()
    assert list(result) == list(model.state_dict())
    assert result["1.num_batches_tracked"] == 9
    assert torch.allclose(result["0.weight"], model[0].weight)
    assert not result["0.weight"].requires_grad


@pytest.mark.parametrize("make", [Average, EMA, LAWA])
def test_errors(make):
    (state,) = states(1)
    with pytest.raises(ParameterError, match=f"{make.__name__}: update it with a state dict first"):
        make().state_dict()
    average = make()
    average.update(state)
    for wrong, message in [
        ({**state, "more": torch.ones(1)}, "state dict 2: different names: more"),
        ({**state, "0.bias": torch.ones(4)}, r"state dict 2: 0\.bias: shape \[4\], before \[5\]"),
        ({**state, "0.bias": torch.ones(5, dtype=torch.int64)}, r"0\.bias: torch.int64, before torch.float32"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            average.update(wrong)
    assert average.count == 1
    assert_equal(average.state_dict(), state)
    with pytest.raises(TypeError, match=r"state dict 2: expected a state dict .* got list"):
        average.update([state])
    with pytest.raises(
        TypeError, match=r"got OrderedDict for 'model_state_dict'; pass what is under 'model_state_dict'"
    ):
        average.update({"model_state_dict": state, "epoch": 3})


def test_ranges():
    with pytest.raises(ParameterError, match=r"decay must be between 0 and 1, got 1\.5"):
        EMA(1.5)
    with pytest.raises(ParameterError, match="k must be at least 1, got 0"):
        LAWA(0)
    average, (state,) = Average(), states(1)
    average.update(state, 0.0)
    with pytest.raises(ParameterError, match="the weights add up to 0"):
        average.state_dict()


@pytest.mark.parametrize("make", [Average, EMA, LAWA])
def test_what_is_not_finite_is_said(make):
    (state,) = states(1)
    average = make()
    average.update({**state, "0.bias": torch.full((5,), float("nan"))})
    with pytest.raises(NonFiniteError, match=rf"{make.__name__}: 0\.bias: the average is not finite"):
        average.state_dict()
