import math

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import ParameterError
from merganser.methods.linear import linear
from merganser.methods.lm_cocktail import lm_cocktail
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.lm_cocktail import lm_cocktail as reference

LOSS = [0.4, 2.3, 7.9]
SETTINGS = [
    {},
    {"weight": [0.5, 0.3, 0.2]},
    {"loss": LOSS},
    {"loss": LOSS, "temperature": 0.3},
    {"loss": LOSS, "weight": [0, 1, 1], "alpha": 0.5},
    {"weight": [2.0, 3.0, 0.5], "loss": LOSS, "alpha": 0.2, "temperature": 2.0},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_reaches_the_bars(parameters):
    _, models = make_models((80, 125), 3)
    assert_reaches_bars(lm_cocktail, reference, None, models, parameters)


def test_reaches_the_bars_with_16_models():
    _, models = make_models((80, 125), 16)
    assert_reaches_bars(lm_cocktail, reference, None, models, {"loss": [i / 2 for i in range(16)], "alpha": 0.3})


def test_by_hand():
    models = [torch.tensor([x]) for x in (10.0, 20.0, 60.0)]

    def merged(**given):
        return merge_tensor(lm_cocktail, None, models, given).item()

    assert merged(weight=[1, 2, 1]) == pytest.approx(27.5)
    # shares 4, 2, 1 of 7
    assert merged(loss=[0, math.log(2), math.log(4)], temperature=1) == pytest.approx(20)
    assert merged(loss=[0, 2 * math.log(2), 2 * math.log(4)], temperature=2) == pytest.approx(20)
    # the paper's: half of the first, and the others alone
    assert merged(alpha=0.5, weight=[0, 1, 1]) == pytest.approx(25)
    assert merged(alpha=0.5, weight=[0, 1, 1], loss=[99, 0, math.log(3)], temperature=1) == pytest.approx(20)


def test_given_weights_are_those_of_linear():
    _, models = make_models((30, 10), 3)
    weight = {"weight": [0.7, 0.1, 0.4]}
    expected = merge_tensor(linear, None, models, weight)
    torch.testing.assert_close(merge_tensor(lm_cocktail, None, models, {**weight, "loss": 3.3}), expected)
    hot = {**weight, "loss": LOSS, "temperature": 1e9}
    torch.testing.assert_close(merge_tensor(lm_cocktail, None, models, hot), expected)


def test_the_ends():
    _, models = make_models((30, 10), 3)
    assert torch.equal(merge_tensor(lm_cocktail, None, models, {"alpha": 1}), models[0])
    for temperature in (1e-3, 1e-300):
        found = merge_tensor(lm_cocktail, None, models, {"loss": [3, 1, 2], "temperature": temperature})
        assert torch.equal(found, models[1])
        # what has no weight does not count, be its loss ever so low
        given = {"loss": [3, 1, 2], "weight": [1, 0, 1], "temperature": temperature}
        assert torch.equal(merge_tensor(lm_cocktail, None, models, given), models[2])


def test_a_weight_is_needed():
    _, models = make_models((3,), 2)
    with pytest.raises(ParameterError, match="weight is 0 for every model"):
        merge_tensor(lm_cocktail, None, models, {"weight": 0})


def test_losses_that_were_measured_are_added():
    models = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0]), torch.tensor([5.0, 0.0])]
    losses = [0.5, 1.5, 0.25]
    given = merge_tensor(lm_cocktail, None, models, {"loss": losses, "temperature": 0.5})
    measured = merge_tensor(lm_cocktail, None, models, {"temperature": 0.5}, data={"measured": losses})
    assert torch.equal(measured, given)
    both = merge_tensor(
        lm_cocktail, None, models, {"temperature": 0.5, "loss": [0.25, 1.0, 0.0]}, data={"measured": [0.25, 0.5, 0.25]}
    )
    assert torch.equal(both, given)
