import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.model_stock import model_stock
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.model_stock import model_stock as reference


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("shape", [(80, 125), (10_000,), (20, 5, 100)])
@pytest.mark.parametrize("parameters", [{}, {"filter_wise": True}, {"norm_floor": 50.0}])
def test_reaches_the_bars(n, shape, parameters):
    base, models = make_models(shape, n, change=0.5)
    assert_reaches_bars(model_stock, reference, base, models, parameters)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_reaches_the_bars_on_a_million_elements(filter_wise):
    base, models = make_models((100, 10_000), 3)
    assert_reaches_bars(model_stock, reference, base, models, {"filter_wise": filter_wise})


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_obtuse_angles_go_behind_the_base_unless_clamped(clamp, filter_wise):
    base, (model, other) = make_models((60, 50), 2)
    models = [model, base - 0.5 * (model - base) + 0.3 * (other - base)]
    parameters = {"clamp": clamp, "filter_wise": filter_wise}
    merged = merge_tensor(model_stock, base, models, parameters)
    torch.testing.assert_close(merged.double(), reference(base, models, **parameters), rtol=1e-6, atol=1e-8)
    assert torch.equal(merged, base) is clamp


def test_one_angle_for_two_models():
    """60 degrees: t = 2 * 0.5 / 1.5."""
    base = torch.tensor([10.0, 20.0])
    models = [base + torch.tensor([1.0, 0.0]), base + torch.tensor([0.5, 0.75**0.5])]
    expected = base + 2 / 3 * torch.tensor([0.75, 0.75**0.5 / 2])
    torch.testing.assert_close(merge_tensor(model_stock, base, models), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_right_angles_give_the_base(filter_wise):
    base = torch.ones(1, 3)
    models = [base + row for row in torch.eye(3).unsqueeze(1)]
    assert torch.equal(merge_tensor(model_stock, base, models, {"filter_wise": filter_wise}), base)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_scales_with_the_task_vectors(filter_wise):
    """Down to changes that an absolute floor on their norms would take for none."""
    base, models = make_models((60, 50), 3)
    base = torch.zeros_like(base)
    parameters = {"filter_wise": filter_wise}
    merged = merge_tensor(model_stock, base, models, parameters)
    tiny = merge_tensor(model_stock, base, [model * 2**-40 for model in models], parameters)
    torch.testing.assert_close(tiny * 2**40, merged, rtol=1e-6, atol=0)


def test_task_vectors_that_cancel_give_the_base():
    """Three at 120 degrees: the formula divides 3 * -0.5 by 0."""
    angles = torch.arange(3) * (2 * torch.pi / 3)
    base = torch.tensor([1.0, 1.0])
    models = list(base + torch.stack([angles.cos(), angles.sin()], dim=1))
    torch.testing.assert_close(merge_tensor(model_stock, base, models), base, rtol=1e-6, atol=0)
