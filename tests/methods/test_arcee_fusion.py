import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.arcee_fusion import arcee_fusion, divergences
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.arcee_fusion import arcee_fusion as reference


# task vectors of 5 %, 0.5 % and 0.1 % of the weights
@pytest.mark.parametrize("change", [0.05, 0.005, 0.001])
@pytest.mark.parametrize("shape", [(80, 125), (10_000,), (20, 5, 100), (2500, 4)])
def test_reaches_the_bars(change, shape):
    base, models = make_models(shape, 1, change=change)
    assert_reaches_bars(arcee_fusion, reference, base, models)


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 1, change=0.01)
    assert_reaches_bars(arcee_fusion, reference, base, models)


@pytest.mark.parametrize("shape", [(1000, 1000), (1_000_000,), (50_000, 20)])
def test_keeps_the_very_entries_of_the_reference(shape):
    base, (model,) = make_models(shape, 1, change=0.02, seed=1)
    kept = merge_tensor(arcee_fusion, base, [model]) != base
    assert torch.equal(kept, reference(base, [model]) != base.double())
    assert 0.01 < kept.float().mean() < 0.3


def test_the_divergence_of_nearly_equal_rows_does_not_cancel():
    """A change of 1e-7: the divergence is half the variance of the change, some 1e-15."""
    change = torch.linspace(-1e-7, 1e-7, 101).double().unsqueeze(0)
    found = divergences(torch.zeros(1, 101).double(), [change])
    torch.testing.assert_close(found[0, 0], (change**2).mean() / 2, rtol=1e-5, atol=0)


def test_huge_weights_have_a_finite_divergence():
    base = torch.tensor([[-3e38, 3e38, 0.0], [1e4, -1e4, 5.0]])
    found = divergences(base, [base.flip(1)])
    assert bool(torch.isfinite(found).all())
    # p is 1 where q is 1e-8, twice (the last row's three are 1, 0, 0 and 0, 0, 1)
    assert found[1].item() == pytest.approx(18.420680, rel=1e-5)


def test_equal_importances_are_all_kept():
    """The quartiles are one value, which is the threshold."""
    base = torch.zeros(400)
    model = torch.tensor([0.1, -0.1]).repeat(200)
    assert torch.equal(merge_tensor(arcee_fusion, base, [model]), model)


@pytest.mark.parametrize("unit", range(1001, 1041))
def test_an_entry_that_equals_the_threshold_is_kept(unit):
    """One row, so importance goes as |delta|: the quartiles are 3, 4 and 8, the threshold is 11.5 units."""
    delta = torch.tensor([[1, -2, 3, 3.5, -4, 5, 8, 11, -11.5]]) * unit * 2.0**-20
    merged = merge_tensor(arcee_fusion, torch.zeros(1, 9), [delta])
    assert torch.equal(merged, torch.where(delta.abs() >= delta.abs().max(), delta, torch.zeros(1, 9)))


def test_a_row_of_one_entry_has_no_divergence_and_is_taken_over():
    base, (model,) = make_models((50, 1), 1)
    assert torch.equal(merge_tensor(arcee_fusion, base, [model]), model)


def test_the_quartiles_are_entries_of_the_ascending_order():
    """One row, so importance ranks as |delta|: of n = 12 the entries 2, 5 and 8, here 3, 6, 9; the cut is 15."""
    delta = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 14.9, 15.1, 30])
    delta = delta * torch.tensor([1.0, -1.0]).repeat(6) * 1e-3
    merged = merge_tensor(arcee_fusion, torch.zeros(12), [delta])
    assert torch.equal(merged, torch.where(delta.abs() >= 0.015, delta, torch.zeros(12)))
