import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.ema import ema
from merganser.methods.linear import linear
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.ema import ema as reference


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 0.9, 0.9999, 1.0])
def test_reaches_the_bars(beta, bias_correction):
    _, models = make_models((80, 125), 5)
    assert_reaches_bars(ema, reference, None, models, {"beta": beta, "bias_correction": bias_correction})


@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bars_with_other_numbers_of_models(n):
    _, models = make_models((80, 125), n)
    assert_reaches_bars(ema, reference, None, models)
    assert_reaches_bars(ema, reference, None, models, {"beta": 0.8, "bias_correction": False})


def test_by_hand():
    models = [torch.tensor([x]) for x in (7.0, 14.0, 28.0)]
    # shares 1, 2, 4 of 7
    assert merge_tensor(ema, None, models).item() == pytest.approx(1 + 4 + 16)
    # shares 1, 1, 2 of 4
    assert merge_tensor(ema, None, models, {"bias_correction": False}).item() == pytest.approx(77 / 4)


def test_the_ends_of_beta():
    _, models = make_models((30, 10), 4)
    for correct in (True, False):
        given = {"beta": 0, "bias_correction": correct}
        assert torch.equal(merge_tensor(ema, None, models, given), models[-1])
    assert torch.equal(merge_tensor(ema, None, models, {"beta": 1, "bias_correction": False}), models[0])
    uniform = merge_tensor(linear, None, models, {"weight": 1})
    torch.testing.assert_close(merge_tensor(ema, None, models, {"beta": 1}), uniform)


def test_one_checkpoint_is_itself():
    _, models = make_models((30, 10), 1)
    assert torch.equal(merge_tensor(ema, None, models, {"beta": 0.99}), models[0])
