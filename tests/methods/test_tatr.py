import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.task_arithmetic import task_arithmetic
from merganser.methods.tatr import tatr
from tests.methods.bars import assert_reaches_bars, make_models
from tests.methods.whole_model import merge_whole_model
from tests.reference.tatr import tatr as reference

SETTINGS = [
    {},
    {"quantile": 0.5, "lambda": 0.3},
    {"quantile": 0.9, "weight": [0.5, -1.0, 2.0]},
    {"quantile": 0.33335},
    {"quantile": 0.0},
    {"quantile": 1.0},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(tatr, reference, base, models, parameters)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_reaches_the_bars_with_other_numbers_of_models(n):
    base, models = make_models((80, 125), n)
    assert_reaches_bars(tatr, reference, base, models, {"quantile": 0.8})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(tatr, reference, base, models)


def test_by_hand():
    base = torch.full((4,), 10.0)
    # |delta_1| * |delta_2| is 6, 8, 0, 2
    models = [base + torch.tensor([3.0, -4.0, 9.0, 1.0]), base + torch.tensor([2.0, 2.0, 0.0, -2.0])]
    found = {q: merge_tensor(tatr, base, models, {"quantile": q}).tolist() for q in (1.0, 0.75, 0.7, 0.5, 0.25, 0.0)}
    assert found[1.0] == [15, 8, 19, 9]
    assert found[0.75] == [15, 10, 19, 9]
    assert found[0.5] == found[0.7] == [10, 10, 19, 9]
    assert found[0.25] == found[0.0] == [10, 10, 19, 10]
    # weights do not move the region
    weighted = merge_tensor(tatr, base, models, {"quantile": 0.75, "weight": [0.0, 9.0], "lambda": 0.5})
    assert weighted.tolist() == [19, 10, 10, 1]


def test_the_cut_itself_is_left_out():
    base = torch.zeros(4)
    models = [torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 2.0, 3.0])]
    assert merge_tensor(tatr, base, models, {"quantile": 0.5}).tolist() == [2, 0, 0, 0]


def test_every_pair_counts():
    base = torch.zeros(2)
    # 1 * 2 + 1 * 3 + 2 * 3 = 11 and 0 * 5 + 0 * 2 + 5 * 2 = 10
    models = [torch.tensor([1.0, 0.0]), torch.tensor([2.0, 5.0]), torch.tensor([-3.0, 2.0])]
    assert merge_tensor(tatr, base, models, {"quantile": 0.5}).tolist() == [0, 7]


def test_one_model_and_changes_apart_are_task_arithmetic():
    base, models = make_models((80, 125), 2)
    parameters = {"quantile": 0.3}
    torch.testing.assert_close(merge_tensor(tatr, base, models[:1], parameters), models[0], rtol=0, atol=1e-8)
    mine = torch.arange(125) < 60
    apart = [torch.where(mine, models[0], base), torch.where(mine, base, models[1])]
    expected = merge_tensor(task_arithmetic, base, apart, {"weight": 1})
    torch.testing.assert_close(merge_tensor(tatr, base, apart, parameters), expected, rtol=0, atol=1e-8)


def test_the_region_does_not_depend_on_the_scale():
    _, vectors = make_models((80, 125), 3)
    zero = torch.zeros(80, 125)
    once = merge_tensor(tatr, zero, vectors, {"quantile": 0.7})
    assert (once == 0).sum() == 3000
    # products of such numbers are below all of float32
    tiny = merge_tensor(tatr, zero, [vector * 2.0**-100 for vector in vectors], {"quantile": 0.7})
    assert torch.equal(tiny * 2.0**100, once)


def test_the_region_of_a_model_is_that_of_one_long_tensor():
    tensors = [make_models((20, 30), 3, seed=1, change=0.01), make_models((500,), 3, seed=2, change=0.1)]
    parameters = {"quantile": 0.7}
    merged = merge_whole_model(tatr, tensors, parameters)
    base = torch.cat([base.reshape(-1) for base, _ in tensors])
    models = [torch.cat([models[i].reshape(-1) for _, models in tensors]) for i in range(3)]
    long = merge_tensor(tatr, base, models, parameters)
    assert torch.equal(torch.cat([result.reshape(-1) for result in merged]), long)
    own = merge_tensor(tatr, *tensors[0], {**parameters, "trim_over": "tensor"})
    assert not torch.equal(merged[0], own)
