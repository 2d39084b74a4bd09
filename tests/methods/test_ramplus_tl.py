import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.ram import ram
from merganser.methods.ramplus_tl import ramplus_tl
from tests.methods.bars import assert_reaches_bars, make_models
from tests.methods.whole_model import merge_whole_model
from tests.reference.ramplus_tl import ramplus_tl as reference

SETTINGS = [
    {},
    {"epsilon": 3e-4},
    {"epsilon": 1e-3, "r": 0.5, "alpha": 3.0},
    {"epsilon": 1e-3, "r": -0.5, "alpha": 100.0},
    {"epsilon": 1e-3, "alpha": 0.0},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(ramplus_tl, reference, base, models, parameters)


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(ramplus_tl, reference, base, models, {"epsilon": 1e-3, "alpha": 3.0})


def test_by_hand():
    base = torch.zeros(6)
    # one shared change; the first has three of its own, the second one
    models = [torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, 0.0]), torch.tensor([4.0, 0.0, 0.0, 0.0, 1.0, 0.0])]
    found = merge_tensor(ramplus_tl, base, models, {"r": 0.5, "alpha": 10})
    assert found.tolist() == pytest.approx([3, 1 + 0.5 / 3, 1 + 0.5 / 3, 1 + 0.5 / 3, 1.5, 0])
    found = merge_tensor(ramplus_tl, base, models, {"r": 0.5, "alpha": 0.5})
    assert found.tolist() == pytest.approx([3, 1 + 0.5 / 3, 1 + 0.5 / 3, 1 + 0.5 / 3, 1.25, 0])


def test_no_amplification_is_ram_bit_by_bit():
    base, models = make_models((80, 125), 3)
    plain = merge_tensor(ram, base, models, {"epsilon": 1e-3})
    for parameters in ({"r": 0}, {"alpha": 0}):
        assert torch.equal(merge_tensor(ramplus_tl, base, models, {"epsilon": 1e-3, **parameters}), plain)


def test_disjoint_changes_are_not_amplified():
    base, models = make_models((80, 125), 2)
    even = torch.arange(125) % 2 == 0
    models = [torch.where(even, models[0], base), torch.where(even, base, models[1])]
    assert torch.equal(merge_tensor(ramplus_tl, base, models), merge_tensor(ram, base, models))


def test_counts_over_the_model_are_those_of_one_long_tensor():
    tensors = [make_models((20, 30), 3, seed=1, change=0.01), make_models((500,), 3, seed=2, change=0.1)]
    parameters = {"epsilon": 1e-3, "alpha": 3.0}
    merged = merge_whole_model(ramplus_tl, tensors, {**parameters, "counts": "model"})
    base = torch.cat([base.reshape(-1) for base, _ in tensors])
    models = [torch.cat([models[i].reshape(-1) for _, models in tensors]) for i in range(3)]
    long = merge_tensor(ramplus_tl, base, models, parameters)
    assert torch.equal(torch.cat([result.reshape(-1) for result in merged]), long)
    # which the tensors are not on their own
    assert not torch.equal(merged[0], merge_tensor(ramplus_tl, *tensors[0], parameters))
