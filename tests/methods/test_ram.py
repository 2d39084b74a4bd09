import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.linear import linear
from merganser.methods.ram import ram
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.ram import ram as reference


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 3e-4, 1e-3, 0.1])
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(epsilon, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(ram, reference, base, models, {"epsilon": epsilon})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    # with the threshold rounded to float32, an element of these changes sides
    assert_reaches_bars(ram, reference, base, models, {"epsilon": 1e-3})


def test_by_hand():
    base = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    first = base + torch.tensor([1.0, 1.0, 0.0, 0.5, -0.25])
    second = base + torch.tensor([0.0, 3.0, 0.0, -0.5, 0.25])
    assert merge_tensor(ram, base, [first, second], {"epsilon": 0.25}).tolist() == [11, 22, 30, 40, 50]
    assert merge_tensor(ram, base, [first, second], {"epsilon": 0.24}).tolist() == [11, 22, 30, 40, 50]
    assert merge_tensor(ram, base, [first, first], {"epsilon": 0.25}).tolist() == [11, 21, 30, 40.5, 50]


def test_changes_in_different_places_add():
    base, models = make_models((80, 125), 2)
    even = torch.arange(125) % 2 == 0
    models = [torch.where(even, models[0], base), torch.where(even, base, models[1])]
    plain = merge_tensor(task_arithmetic, base, models, {"weight": 1})
    assert torch.equal(merge_tensor(ram, base, models, {"epsilon": 0}), plain)


def test_changes_everywhere_are_the_mean():
    base, models = make_models((80, 125), 3)
    plain = merge_tensor(linear, None, models, {"weight": 1})
    torch.testing.assert_close(merge_tensor(ram, base, models, {"epsilon": 0}), plain, rtol=0, atol=3e-8)


def test_one_model_is_that_model_to_the_threshold():
    base, (model,) = make_models((80, 125), 1)
    merged = merge_tensor(ram, base, [model], {"epsilon": 1e-4})
    kept = (model - base).abs() > 1e-4
    assert torch.equal(merged[~kept], base[~kept])
    torch.testing.assert_close(merged[kept], model[kept], rtol=0, atol=1e-8)


def test_models_in_another_order_are_the_same_models():
    base, models = make_models((80, 125), 3)
    merged = merge_tensor(ram, base, models, {"epsilon": 3e-4})
    torch.testing.assert_close(merge_tensor(ram, base, models[::-1], {"epsilon": 3e-4}), merged, rtol=0, atol=1e-8)
