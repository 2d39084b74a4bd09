import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.nearswap import nearswap
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.nearswap import nearswap as reference


@pytest.mark.parametrize("t", [0.0, 1e-7, 1e-4, 1e-3, 10.0])
def test_reaches_the_bars(t):
    base, models = make_models((80, 125), 1)
    assert_reaches_bars(nearswap, reference, base, models, {"t": t})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 1)
    assert_reaches_bars(nearswap, reference, base, models, {"t": 3e-4})


def test_no_step_gives_the_base_and_a_long_one_the_model():
    base, (model,) = make_models((80, 125), 1)
    assert torch.equal(merge_tensor(nearswap, base, [model], {"t": 0}), base)
    torch.testing.assert_close(merge_tensor(nearswap, base, [model], {"t": 1}), model, rtol=0, atol=1e-8)


def test_no_weight_moves_further_than_t():
    base, models = make_models((80, 125), 1)
    moved = (merge_tensor(nearswap, base, models, {"t": 1e-4}).double() - base.double()).abs()
    assert moved.max() <= 1e-4 + 1e-8
    # about nine in ten are further apart than that
    assert (moved > 0.99e-4).float().mean() > 0.8
