import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.dare_linear import dare_linear
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.dare_linear import dare_linear as reference

WEIGHT = [0.5, 0.3, 0.4]
SETTINGS = [
    {"density": [0.1, 0.5, 0.9]},
    {"density": [0.0, 0.5, 1.0], "lambda": 0.7},
    {"density": [0.1, 0.5, 0.9], "normalize": True},
    {"density": [0.1, 0.5, 0.9], "rescale": False},
    {"density": [0.1, 0.5, 0.9], "rescale_to": "l1"},
    {"density": [0.0, 0.5, 1.0], "rescale_to": "l1"},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(dare_linear, reference, base, models, {"weight": WEIGHT, **parameters})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(dare_linear, reference, base, models, {"weight": WEIGHT, "density": [0.1, 0.5, 0.9]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale_to", ["expectation", "l1"])
def test_a_full_density_is_task_arithmetic_bit_by_bit(dtype, rescale_to):
    base, models = make_models((80, 125), 3)
    base, models = base.to(dtype), [model.to(dtype) for model in models]
    parameters = {"weight": WEIGHT, "lambda": 0.7}
    plain = merge_tensor(task_arithmetic, base, models, parameters)
    assert torch.equal(merge_tensor(dare_linear, base, models, {**parameters, "rescale_to": rescale_to}), plain)


def test_no_density_gives_the_base():
    base, models = make_models((80, 125), 3)
    assert torch.equal(merge_tensor(dare_linear, base, models, {"weight": 1, "density": 0}), base)


def test_keeps_the_expectation():
    models = [torch.linspace(-2, 3, 200), torch.linspace(1, 5, 200)]
    runs = 4000
    repeated = [model.expand(runs, 200) for model in models]
    drawn = merge_tensor(dare_linear, torch.zeros(runs, 200), repeated, {"weight": [0.5, 1], "density": [0.2, 0.7]})
    expected = 0.5 * models[0] + models[1]
    # the variance of a kept entry is delta^2 (1 - density) / density
    deviation = (0.25 * models[0] ** 2 * 0.8 / 0.2 + models[1] ** 2 * 0.3 / 0.7).sqrt() / runs**0.5
    assert (drawn.mean(dim=0) - expected).abs().div(deviation).max() < 5
    torch.testing.assert_close(drawn.var(dim=0).mean(), deviation.square().mean() * runs, rtol=0.05, atol=0)


def test_models_and_tensors_drop_different_entries():
    base, models = torch.zeros(10_000), [torch.ones(10_000), torch.ones(10_000)]
    merged = merge_tensor(dare_linear, base, models, {"weight": [1, 10], "density": 0.5, "rescale": False})
    # none, the first, the second, both: a quarter each
    counts = torch.tensor([(merged == value).sum() for value in (0, 1, 10, 11)])
    assert counts.sum() == 10_000
    assert (counts - 2500).abs().max() < 250
    other = merge_tensor(dare_linear, base, models, {"weight": [1, 10], "density": 0.5, "rescale": False}, name="other")
    assert 0.2 < (merged == other).float().mean() < 0.3


def test_l1_restores_the_norm():
    base, (model,) = make_models((80, 125), 1)
    parameters = {"weight": 1, "density": 0.3, "rescale_to": "l1"}
    merged = merge_tensor(dare_linear, torch.zeros_like(base), [model - base], parameters)
    torch.testing.assert_close(merged.abs().sum(), (model - base).abs().sum(), rtol=1e-5, atol=0)


def test_nothing_is_measured_by_default():
    (gain,) = dare_linear.statistics.values()
    half = {"density": (1.0, 0.5)}
    assert not gain.wanted({"rescale": True, "rescale_to": "expectation", **half})
    assert not gain.wanted({"rescale": False, "rescale_to": "l1", **half})
    assert gain.wanted({"rescale": True, "rescale_to": "l1", **half})
    # nor where nothing is dropped, or everything
    assert not gain.wanted({"rescale": True, "rescale_to": "l1", "density": (1.0, 0.0)})
