import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.dare_ties import dare_ties
from merganser.methods.della import della
from merganser.methods.ties import ties
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.della import della as reference

WEIGHT = [0.5, 0.3, 0.4]
SETTINGS = [
    {"density": [0.3, 0.5, 0.7]},
    {"density": [0.3, 0.5, 0.7], "epsilon": [0.0, 0.4, 0.25], "lambda": 1.1},
    {"density": [0.0, 0.5, 1.0]},
    {"density": [0.3, 0.5, 0.7], "normalize": False},
    {"density": [0.3, 0.5, 0.7], "rescale": False},
    {"density": [0.3, 0.5, 0.7], "rescale_to": "l1"},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(della, reference, base, models, {"weight": WEIGHT, **parameters})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(della, reference, base, models, {"weight": WEIGHT, "density": [0.3, 0.5, 0.7]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_density_is_ties_without_a_trim(dtype):
    base, models = make_models((80, 125), 3)
    base, models = base.to(dtype), [model.to(dtype) for model in models]
    plain = merge_tensor(ties, base, models, {"weight": WEIGHT})
    assert torch.equal(merge_tensor(della, base, models, {"weight": WEIGHT}), plain)


def test_no_spread_is_dare_bit_by_bit():
    base, models = make_models((80, 125), 3)
    parameters = {"weight": WEIGHT, "density": [0.25, 0.5, 0.75], "normalize": True}
    plain = merge_tensor(dare_ties, base, models, parameters)
    assert torch.equal(merge_tensor(della, base, models, {**parameters, "epsilon": 0}), plain)
