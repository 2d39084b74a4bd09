import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.breadcrumbs import breadcrumbs
from merganser.methods.breadcrumbs_ties import breadcrumbs_ties
from merganser.methods.ties import ties
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.breadcrumbs_ties import breadcrumbs_ties as reference

WEIGHT = [0.5, 0.3, 0.4]
SETTINGS = [
    {},
    {"density": [0.1, 0.5, 0.9]},
    {"density": [0.15, 0.5, 1.0], "gamma": [0.006, 0.2, 0.3], "lambda": 0.2, "normalize": True},
    {"density": [0.1, 0.5, 0.9], "rescale": True},
    {"density": [0.15, 0.5, 1.0], "gamma": [0.006, 0.2, 0.3], "precedence": "density"},
    {"density": [0.15, 0.5, 1.0], "gamma": [0.006, 0.2, 0.3], "by": "row"},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(breadcrumbs_ties, reference, base, models, {"weight": WEIGHT, **parameters})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    parameters = {"weight": WEIGHT, "density": [0.1, 0.5, 0.9], "gamma": [0.01, 0.02, 0.3]}
    assert_reaches_bars(breadcrumbs_ties, reference, base, models, parameters)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_without_outliers_it_is_ties_bit_by_bit(density):
    base, models = make_models((80, 125), 3)
    parameters = {"weight": WEIGHT, "density": density, "normalize": True}
    plain = merge_tensor(ties, base, models, parameters)
    assert torch.equal(merge_tensor(breadcrumbs_ties, base, models, {**parameters, "gamma": 0}), plain)


def test_one_model_has_no_one_to_disagree_with():
    base, (model,) = make_models((80, 125), 1)
    parameters = {"weight": 0.7, "density": 0.4, "gamma": 0.1}
    plain = merge_tensor(breadcrumbs, base, [model], parameters)
    assert torch.equal(merge_tensor(breadcrumbs_ties, base, [model], parameters), plain)
