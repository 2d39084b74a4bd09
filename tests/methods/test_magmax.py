import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.magmax import magmax
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.magmax import magmax as reference


@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize("parameters", [{}, {"lambda": 1.0}, {"lambda": -0.3}], ids=str)
def test_reaches_the_bars(parameters, models):
    base, others = make_models((80, 125), models)
    assert_reaches_bars(magmax, reference, base, others, parameters)


def test_by_hand():
    base = torch.ones(5)
    first, second = base + torch.tensor([1, -2, 0, 3, -4.0]), base + torch.tensor([-2, 1, 0, -3, 4.0])
    expected = base + torch.tensor([-2, -2, 0, 3, 4.0])
    for models in ([first, second], [second, first]):
        assert torch.equal(merge_tensor(magmax, base, models, {"lambda": 1}), expected)
    assert torch.equal(merge_tensor(magmax, base, [first, second], {}), base + (expected - base) / 2)


def test_a_model_that_is_the_base_says_nothing():
    base, models = make_models((30, 20), 2)
    assert torch.equal(merge_tensor(magmax, base, [*models, base], {}), merge_tensor(magmax, base, models, {}))
