import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import ParameterError
from merganser.methods.dare_linear import dare_linear
from merganser.methods.della_linear import della_linear
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.della_linear import della_linear as reference

WEIGHT = [0.5, 0.3, 0.4]
SETTINGS = [
    {"density": [0.3, 0.5, 0.7]},
    {"density": [0.3, 0.5, 0.7], "epsilon": [0.0, 0.4, 0.25], "lambda": 0.7},
    {"density": [0.0, 0.5, 1.0]},
    {"density": [0.3, 0.5, 0.7], "normalize": True},
    {"density": [0.3, 0.5, 0.7], "rescale": False},
    {"density": [0.3, 0.5, 0.7], "rescale_to": "l1"},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(della_linear, reference, base, models, {"weight": WEIGHT, **parameters})


@pytest.mark.parametrize("shape", [(10_000,), (10_000, 1), (1, 10_000), (20, 25, 20), (50, 4, 10, 5)])
def test_reaches_the_bars_in_any_shape(shape):
    base, models = make_models(shape, 3)
    assert_reaches_bars(della_linear, reference, base, models, {"weight": WEIGHT, "density": [0.3, 0.5, 0.7]})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    # with the probabilities rounded to the nearest float32, an element of these is dropped that should be kept
    parameters = {"weight": WEIGHT, "density": [0.7, 0.3, 0.5], "epsilon": [0.1, 0.2, 0.25]}
    assert_reaches_bars(della_linear, reference, base, models, parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale_to", ["expectation", "l1"])
def test_a_full_density_is_task_arithmetic_bit_by_bit(dtype, rescale_to):
    base, models = make_models((80, 125), 3)
    base, models = base.to(dtype), [model.to(dtype) for model in models]
    parameters = {"weight": WEIGHT, "lambda": 0.7}
    plain = merge_tensor(task_arithmetic, base, models, parameters)
    assert torch.equal(merge_tensor(della_linear, base, models, {**parameters, "rescale_to": rescale_to}), plain)


@pytest.mark.parametrize("rescale_to", ["expectation", "l1"])
def test_no_spread_is_dare_bit_by_bit(rescale_to):
    base, models = make_models((80, 125), 3)
    parameters = {"weight": WEIGHT, "density": [0.25, 0.5, 0.75], "rescale_to": rescale_to}
    plain = merge_tensor(dare_linear, base, models, parameters)
    assert torch.equal(merge_tensor(della_linear, base, models, {**parameters, "epsilon": 0}), plain)


def test_keeps_the_expectation_of_small_and_large_entries():
    model = torch.tensor([4, -3, 2, 1, 0.5, -7, 6, 5, 8])
    runs = 6000
    parameters = {"weight": 1, "density": 0.4, "epsilon": 0.3}
    drawn = merge_tensor(della_linear, torch.zeros(runs, 9), [model.expand(runs, 9)], parameters)
    rank = model.abs().argsort().argsort()
    probability = 0.1 + 0.6 * rank / 8
    kept = (drawn != 0).float().mean(dim=0)
    assert ((kept - probability) / (probability * (1 - probability) / runs).sqrt()).abs().max() < 5
    deviation = model.abs() * ((1 - probability) / probability / runs).sqrt()
    assert ((drawn.mean(dim=0) - model) / deviation).abs().max() < 5


def test_of_equal_entries_the_first_has_the_smaller_rank():
    parameters = {"weight": 1, "density": 0.5, "epsilon": 0.45, "rescale": False}
    kept = merge_tensor(della_linear, torch.zeros(4000, 4), [torch.ones(4000, 4)], parameters).mean(dim=0)
    torch.testing.assert_close(kept, torch.tensor([0.05, 0.35, 0.65, 0.95]), rtol=0, atol=0.04)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.15, 0.15), (0.9, 0.15), (0.85, 0.15), (0.5, 0.5)])
def test_probabilities_outside_the_interval_are_refused(density, epsilon):
    base, models = make_models((4, 5), 2)
    parameters = {"weight": 1, "density": [0.5, density], "epsilon": [0.1, epsilon]}
    with pytest.raises(ParameterError, match=rf"density - epsilon .* of model 1 .* got density {density:g}"):
        merge_tensor(della_linear, base, models, parameters)


@pytest.mark.parametrize("density", [0, 1])
def test_the_spread_has_no_say_at_the_ends(density):
    base, models = make_models((4, 5), 2)
    merge_tensor(della_linear, base, models, {"weight": 1, "density": density, "epsilon": 0.7})
