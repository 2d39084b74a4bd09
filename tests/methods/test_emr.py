import pytest
import torch

from merganser.engine.blocks import merge_tensors
from merganser.methods.emr import emr
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.emr import emr as reference


@pytest.mark.parametrize("n", [1, 2, 3, 16])
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(n, change):
    base, models = make_models((80, 125), n, change=change)
    assert_reaches_bars(emr, reference, base, models)


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(emr, reference, base, models)


def test_by_hand():
    base = torch.full((5,), 10.0)
    # the sum is 3, -1, 0, 0 and 0: ties elect minus, and where nothing is below 0, nothing is elected
    first = base + torch.tensor([1.0, 2.0, 1.0, 0.0, -1.0])
    second = base + torch.tensor([4.0, -1.5, -2.0, 0.0, 1.0])
    third = base + torch.tensor([-2.0, -1.5, 1.0, 0.0, 0.0])
    assert merge_tensors(emr, base, [first, second, third]).tolist() == [14, 8.5, 8, 10, 9]


def test_rounding_does_not_elect():
    # in float32 the first two add up to the first, and the sum to 0
    models = [torch.tensor([1.0]), torch.tensor([2.0**-30]), torch.tensor([-1.0])]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert merge_tensors(emr, torch.zeros(1), [models[i] for i in order]).item() == 1


def test_one_model_and_equal_models_are_that_model():
    base, (model,) = make_models((80, 125), 1)
    for n in (1, 2, 5):
        torch.testing.assert_close(merge_tensors(emr, base, [model] * n), model, rtol=0, atol=1e-8)


def test_no_element_moves_against_its_vote():
    base, models = make_models((80, 125), 4)
    vectors = torch.stack([model - base for model in models])
    moved = merge_tensors(emr, torch.zeros_like(base), list(vectors))
    assert (moved * vectors.sum(dim=0) >= 0).all()
    assert torch.equal(moved.abs(), (vectors * moved.sign()).amax(dim=0))
