import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.localize_and_stitch import localize_and_stitch
from merganser.methods.ram import ram
from tests.methods.bars import assert_reaches_bars, make_models
from tests.methods.whole_model import merge_whole_model
from tests.reference.localize_and_stitch import localize_and_stitch as reference

SETTINGS = [{}, {"density": 0.5}, {"density": 1.0}, {"density": [0.0, 0.3, 1.0]}, {"density": 0.00001}]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(localize_and_stitch, reference, base, models, parameters)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bars_with_other_numbers_of_models(n):
    base, models = make_models((80, 125), n)
    assert_reaches_bars(localize_and_stitch, reference, base, models, {"density": 0.3})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(localize_and_stitch, reference, base, models)


def test_by_hand():
    base = torch.full((4,), 10.0)
    models = [base + torch.tensor([4.0, -3.0, 1.0, 0.0]), base + torch.tensor([-2.0, 1.0, 0.5, 5.0])]
    found = merge_tensor(localize_and_stitch, base, models, {"density": 0.5})
    assert found.tolist() == [11, 7, 10, 15]
    # zeros count as nobody's
    found = merge_tensor(localize_and_stitch, base, models, {"density": 1.0})
    assert found.tolist() == [11, 9, 10.75, 15]


def test_a_full_density_is_ram_without_a_threshold():
    base, models = make_models((80, 125), 3)
    models[0] = torch.where(torch.rand(base.shape, generator=torch.Generator().manual_seed(1)) < 0.3, base, models[0])
    expected = merge_tensor(ram, base, models, {"epsilon": 0})
    assert torch.equal(merge_tensor(localize_and_stitch, base, models, {"density": 1.0}), expected)


def test_equal_models_are_one_of_them():
    base, (model,) = make_models((80, 125), 1)
    once = merge_tensor(localize_and_stitch, base, [model], {"density": 0.2})
    assert 0 < (once != base).sum() <= 2000
    found = merge_tensor(localize_and_stitch, base, [model] * 3, {"density": 0.2})
    torch.testing.assert_close(found, once, rtol=0, atol=1e-8)


def test_a_trim_over_the_model_is_that_of_one_long_tensor():
    tensors = [make_models((20, 30), 3, seed=1, change=0.01), make_models((500,), 3, seed=2, change=0.1)]
    parameters = {"density": 0.3}
    merged = merge_whole_model(localize_and_stitch, tensors, {**parameters, "trim_over": "model"})
    base = torch.cat([base.reshape(-1) for base, _ in tensors])
    models = [torch.cat([models[i].reshape(-1) for _, models in tensors]) for i in range(3)]
    long = merge_tensor(localize_and_stitch, base, models, parameters)
    assert torch.equal(torch.cat([result.reshape(-1) for result in merged]), long)
    assert not torch.equal(merged[0], merge_tensor(localize_and_stitch, *tensors[0], parameters))
