import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.sce import sce, spread
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.sce import sce as reference

SETTINGS = [
    {},
    {"select_topk": 0.1},
    {"select_topk": 0.5},
    {"select_topk": 0.9},
    {"select_topk": 0.0},
    {"select_topk": 0.3, "select": "weight"},
    {"select_topk": 0.3, "floor": 1e-6},
    {"floor": 0.4},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(sce, reference, base, models, parameters)


@pytest.mark.parametrize("n", [2, 4, 5])
def test_reaches_the_bars_with_other_numbers_of_models(n):
    base, models = make_models((80, 125), n)
    assert_reaches_bars(sce, reference, base, models, {"select_topk": 0.4})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(sce, reference, base, models, {"select_topk": 0.5})


def test_by_hand():
    base = torch.zeros(4)
    # variances 4, 0, 1, 0.25
    models = [torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([-1.0, 1.0, 0.0, 1.0])]
    # mean squares 14 and 3: their shares decide where both agree
    first = 14 / 17
    assert merge_tensor(sce, base, models).tolist() == pytest.approx([3, 1, 2, 1])
    two = [torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])]
    assert merge_tensor(sce, base, two).tolist() == pytest.approx([first * 3 + 3 / 17, 1, 2, 1])
    # two thirds of the three that vary
    selected = merge_tensor(sce, base, models, {"select_topk": 0.67})
    assert selected.tolist() == pytest.approx([3, 0, 2, 0])
    # a third of them, which is two, as they vary equally: the mean squares are 13 and 1
    weighed = merge_tensor(sce, base, two, {"select_topk": 0.34, "select": "weight"})
    assert weighed.tolist() == pytest.approx([13 / 14 * 3 + 1 / 14, 1, 2, 1])


def test_elements_that_vary_as_much_as_the_last_are_all_selected():
    base = torch.zeros(6)
    models = [torch.tensor([1.0, 2.0, 1.0, 4.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0, 0.0])]
    found = merge_tensor(sce, base, models, {"select_topk": 0.4})
    assert (found != 0).tolist() == [True, True, True, True, False, True]
    found = merge_tensor(sce, base, models, {"select_topk": 0.39})
    assert (found != 0).tolist() == [False, False, False, True, False, False]


def test_equal_variances_are_equal_in_any_order():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4096, generator=generator).mul(0.05).bfloat16()
    models = [(base.float() + torch.randn(4096, generator=generator) * 1e-3).bfloat16().float() for _ in range(3)]
    found = {tuple(spread([models[i] for i in order]).tolist()) for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0))}
    assert len(found) == 1


def test_the_spread_is_the_variance():
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(1000, generator=generator) for _ in range(4)]
    expected = torch.stack([model.double() for model in models]).var(dim=0, unbiased=False) * 16
    torch.testing.assert_close(spread(models), expected, rtol=1e-12, atol=0)
    # where the mean is large the reference loses digits, not the difference to one of the models
    near = [1 + model * 1e-4 for model in models]
    expected = torch.stack([model.double() - 1 for model in near]).var(dim=0, unbiased=False) * 16
    torch.testing.assert_close(spread(near), expected, rtol=1e-12, atol=0)
    assert torch.equal(spread(models[:1]), torch.zeros(1000, dtype=torch.float64))
    assert torch.equal(spread([models[0]] * 3), torch.zeros(1000, dtype=torch.float64))


def test_equal_models_are_that_model_unless_a_selection_finds_no_difference():
    base, (model,) = make_models((80, 125), 1)
    torch.testing.assert_close(merge_tensor(sce, base, [model] * 3), model, rtol=0, atol=1e-8)
    assert torch.equal(merge_tensor(sce, base, [model] * 3, {"select_topk": 0.9}), base)


def test_scaling_the_task_vectors_scales_the_merge():
    base, models = make_models((80, 125), 3)
    zero = torch.zeros_like(base)
    vectors = [model - base for model in models]
    for parameters in ({}, {"select_topk": 0.3}, {"select_topk": 0.3, "select": "weight"}):
        once = merge_tensor(sce, zero, vectors, parameters)
        tiny = merge_tensor(sce, zero, [vector * 2.0**-40 for vector in vectors], parameters)
        assert torch.equal(tiny * 2.0**40, once)


def test_a_floor_makes_small_models_equal():
    base = torch.zeros(2)
    models = [torch.tensor([3e-4, 0.0]), torch.tensor([1e-4, 1e-4])]
    assert merge_tensor(sce, base, models)[0].item() == pytest.approx(9 / 11 * 3e-4 + 2 / 11 * 1e-4)
    assert merge_tensor(sce, base, models, {"floor": 1e-6})[0].item() == pytest.approx(2e-4)


def test_passes_are_saved_where_all_is_selected():
    assert not sce.statistics["cut"].wanted({"select_topk": 1.0})
    assert sce.statistics["cut"].wanted({"select_topk": 0.99})
