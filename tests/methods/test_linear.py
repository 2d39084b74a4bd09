import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.linear import linear
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.linear import linear as reference


@pytest.mark.parametrize(
    "parameters",
    [
        {"weight": [1.0, 1.0, 1.0]},
        {"weight": [0.2, 0.5, 1.7]},
        {"weight": [1.5, -0.3, 0.1]},
        {"weight": [0.2, 0.5, 0.1], "normalize": False},
    ],
)
def test_reaches_the_bars(parameters):
    _, models = make_models((80, 125), 3)
    assert_reaches_bars(linear, reference, None, models, parameters)


def test_reaches_the_bars_on_a_million_elements():
    _, models = make_models((1000, 1000), 4, change=0.5)
    assert_reaches_bars(linear, reference, None, models, {"weight": [0.4, 0.3, 0.2, 0.7]})


def test_weights_that_nearly_cancel_are_added_in_float64():
    # in float32 their sum would be wrong by 1e-5 of itself
    merged = merge_tensor(linear, None, [torch.ones(5), torch.zeros(5)], {"weight": [1.0, -0.999]})
    torch.testing.assert_close(merged, torch.full((5,), 1000.0), rtol=1e-6, atol=0)


def test_one_hot_weights_give_that_model():
    _, models = make_models((30, 10), 3)
    assert torch.equal(merge_tensor(linear, None, models, {"weight": [0, 1, 0]}), models[1])


def test_one_model_is_itself_whatever_its_weight():
    _, models = make_models((30, 10), 1)
    torch.testing.assert_close(merge_tensor(linear, None, models, {"weight": [0.3]}), models[0], rtol=2e-7, atol=0)
