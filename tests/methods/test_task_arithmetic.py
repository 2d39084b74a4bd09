import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import ParameterError
from merganser.methods.linear import linear
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.task_arithmetic import task_arithmetic as reference

SETTINGS = [
    {"weight": [1.0, 1.0, 1.0]},
    {"weight": [0.5, 0.3, 0.4], "lambda": 0.3},
    {"weight": [0.5, -0.3, 0.4], "lambda": -1.0},
    {"weight": [0.5, 0.3, 0.4], "normalize": True},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(task_arithmetic, reference, base, models, parameters)


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(task_arithmetic, reference, base, models, {"weight": [0.5, 0.3, 0.4], "lambda": 0.7})


def test_one_model_in_full_is_that_model():
    base, (model,) = make_models((80, 125), 1)
    torch.testing.assert_close(merge_tensor(task_arithmetic, base, [model], {"weight": 1}), model, rtol=0, atol=1e-8)


def test_no_lambda_gives_the_base():
    base, models = make_models((80, 125), 2)
    assert torch.equal(merge_tensor(task_arithmetic, base, models, {"weight": 1, "lambda": 0}), base)


def test_equal_shares_are_the_mean():
    base, models = make_models((80, 125), 3)
    shares = merge_tensor(task_arithmetic, base, models, {"weight": 1, "lambda": 1 / 3})
    torch.testing.assert_close(shares, merge_tensor(linear, None, models, {"weight": 1}), rtol=0, atol=3e-8)


def test_task_vectors_add():
    base, models = make_models((80, 125), 2)
    first = merge_tensor(task_arithmetic, base, models[:1], {"weight": 0.5})
    second = merge_tensor(task_arithmetic, base, models[1:], {"weight": 0.25})
    both = merge_tensor(task_arithmetic, base, models, {"weight": [0.5, 0.25]})
    torch.testing.assert_close(both - base, (first - base) + (second - base), rtol=0, atol=3e-8)


def test_weights_that_cancel_are_refused_where_their_sum_divides():
    base, models = make_models((80, 125), 3)
    weight = [0.1, 0.2, -0.3]
    merge_tensor(task_arithmetic, base, models, {"weight": weight})
    with pytest.raises(ParameterError, match=r"add up to 0.*got 0.1, 0.2, -0.3"):
        merge_tensor(task_arithmetic, base, models, {"weight": weight, "normalize": True})
