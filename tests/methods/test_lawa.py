import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.ema import ema
from merganser.methods.lawa import lawa
from merganser.methods.linear import linear
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.lawa import lawa as reference


@pytest.mark.parametrize("k", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("n", [1, 3, 4, 16])
def test_reaches_the_bars(n, k):
    _, models = make_models((80, 125), n)
    assert_reaches_bars(lawa, reference, None, models, {"k": k})


def test_by_hand():
    models = [torch.tensor([x]) for x in (100.0, 1.0, 2.0, 6.0)]
    assert [merge_tensor(lawa, None, models, {"k": k}).item() for k in (1, 2, 3, 4, 9)] == [6, 4, 3, 27.25, 27.25]


def test_one_is_the_last_and_many_are_the_uniform_soup():
    _, models = make_models((30, 10), 4)
    assert torch.equal(merge_tensor(lawa, None, models, {"k": 1}), models[-1])
    assert torch.equal(merge_tensor(lawa, None, models), merge_tensor(linear, None, models, {"weight": 1}))
    torch.testing.assert_close(merge_tensor(lawa, None, models), merge_tensor(ema, None, models, {"beta": 1}))
