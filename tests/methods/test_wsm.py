import math

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.linear import linear
from merganser.methods.wsm import wsm
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.wsm import wsm as reference

DECAYS = ["1-sqrt", "linear", "cosine"]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("n", [1, 2, 3, 16])
def test_reaches_the_bars(n, decay):
    _, models = make_models((80, 125), n)
    assert_reaches_bars(wsm, reference, None, models, {"decay": decay})


def test_by_hand():
    models = [torch.tensor([x]) for x in (0.0, 100.0, 1100.0, 11100.0)]
    # the updates 100, 1000 and 10000 at a quarter, half and three quarters of the decay
    expected = {
        "1-sqrt": 50 + 1000 * (1 - math.sqrt(1 / 2)) + 10000 * (1 - math.sqrt(3 / 4)),
        "linear": 75 + 500 + 2500,
        "cosine": 100 * (1 + math.sqrt(1 / 2)) / 2 + 500 + 10000 * (1 - math.sqrt(1 / 2)) / 2,
    }
    for decay, value in expected.items():
        assert merge_tensor(wsm, None, models, {"decay": decay}).item() == pytest.approx(value)
    assert merge_tensor(wsm, None, models).item() == pytest.approx(expected["1-sqrt"])


def test_linear_decay_is_the_mean():
    _, models = make_models((30, 10), 5)
    found = merge_tensor(wsm, None, models, {"decay": "linear"})
    torch.testing.assert_close(found, merge_tensor(linear, None, models, {"weight": 1}))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_weights_are_shares_and_form_the_decay(decay, n):
    # checkpoint j is the unit vector j, so that the merge is its weights
    weights = merge_tensor(wsm, None, list(torch.eye(n)), {"decay": decay})
    assert float(weights.sum()) == pytest.approx(1)
    assert bool((weights > 0).all())
    largest = {"1-sqrt": 0, "linear": None, "cosine": n // 2}[decay]
    if largest is None:
        torch.testing.assert_close(weights, torch.full((n,), 1 / n))
    else:
        assert float(weights[largest]) == pytest.approx(float(weights.max()))


@pytest.mark.parametrize("decay", DECAYS)
def test_one_checkpoint_is_itself(decay):
    _, models = make_models((30, 10), 1)
    assert torch.equal(merge_tensor(wsm, None, models, {"decay": decay}), models[0])
