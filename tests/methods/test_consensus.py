import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.consensus import consensus
from merganser.methods.task_arithmetic import task_arithmetic
from merganser.methods.ties import ties
from tests.methods.bars import assert_reaches_bars, make_models
from tests.methods.whole_model import merge_whole_model
from tests.reference.consensus import consensus as reference

SETTINGS = [
    {},
    {"k": 1},
    {"k": 3, "mask_lambda": 0.2},
    {"mask_lambda": [0.0, 0.4, 2.5], "lambda": 0.3},
    {"weight": [1.0, -0.5, 2.0], "lambda": -0.7},
    {"vector": "ties"},
    {"vector": "ties", "density": [0.1, 0.5, 1.0], "weight": [0.5, 1.0, 1.5], "k": 1},
    {"vector": "ties", "density": [0.0, 0.5, 0.00001]},
]


def reference_of(base, models, **parameters):
    return reference(base, models, **{"lambda_" if k == "lambda" else k: v for k, v in parameters.items()})


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(consensus, reference_of, base, models, parameters)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_reaches_the_bars_with_other_numbers_of_models(n):
    base, models = make_models((80, 125), n)
    assert_reaches_bars(consensus, reference_of, base, models, {"mask_lambda": 0.1})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(consensus, reference_of, base, models)


def test_by_hand():
    base = torch.full((4,), 10.0)
    # with lambda 0.5: needed by both, by the first alone, by none (they cancel to little), and by the second alone
    models = [base + torch.tensor([3.0, 4.0, 0.0, 1.0]), base + torch.tensor([5.0, 1.0, 0.0, -4.0])]
    half = {"mask_lambda": 0.5}
    assert merge_tensor(consensus, base, models, half).tolist() == [18, 10, 10, 10]
    assert merge_tensor(consensus, base, models, {**half, "k": 1}).tolist() == [18, 15, 10, 7]
    assert merge_tensor(consensus, base, models, {**half, "k": 0, "lambda": 0.5}).tolist() == [14, 12.5, 10, 8.5]
    # each by its own lambda: the second model now needs the second element, too
    assert merge_tensor(consensus, base, models, {"mask_lambda": [0.5, 0.2]}).tolist() == [18, 15, 10, 10]


def test_equal_sides_are_not_enough():
    base = torch.zeros(2)
    models = [torch.tensor([2.0, 2.0]), torch.tensor([5.0, 4.999])]
    # 2 is 0.4 * 5
    assert merge_tensor(consensus, base, models).tolist() == pytest.approx([0, 6.999])
    assert merge_tensor(consensus, base, models, {"mask_lambda": 0.39}).tolist() == pytest.approx([7, 6.999])


def test_without_a_count_it_is_task_arithmetic():
    base, models = make_models((80, 125), 3)
    weight = {"weight": [0.5, 0.3, -0.4], "lambda": 0.7}
    expected = merge_tensor(task_arithmetic, base, models, weight, compute=torch.float64, dtype=torch.float32)
    torch.testing.assert_close(merge_tensor(consensus, base, models, {**weight, "k": 0}), expected)
    expected = merge_tensor(ties, base, models, {**weight, "density": 0.2, "normalize": False})
    found = merge_tensor(consensus, base, models, {**weight, "k": 0, "vector": "ties"})
    torch.testing.assert_close(found, expected)


def test_a_count_that_no_element_reaches_gives_the_base():
    base, models = make_models((80, 125), 3)
    for parameters in ({"k": 4}, {"k": 4, "vector": "ties"}):
        assert torch.equal(merge_tensor(consensus, base, models, parameters), base)


def test_one_model():
    base, models = make_models((80, 125), 1)
    # what the others add is nothing: whatever changed counts, once
    torch.testing.assert_close(merge_tensor(consensus, base, models, {"k": 1}), models[0], rtol=0, atol=1e-8)
    assert torch.equal(merge_tensor(consensus, base, models), base)


def test_equal_models_stay_while_each_outweighs_the_others():
    base, (model,) = make_models((80, 125), 1)
    # 1 > 0.4 * 2, and not 1 > 0.4 * 3
    shares = {"lambda": 1 / 3}
    torch.testing.assert_close(merge_tensor(consensus, base, [model] * 3, shares), model, rtol=0, atol=1e-8)
    assert torch.equal(merge_tensor(consensus, base, [model] * 4, {"lambda": 0.25}), base)


def test_masks_do_not_depend_on_the_scale():
    base, models = make_models((80, 125), 3)
    zero = torch.zeros_like(base)
    vectors = [model - base for model in models]
    once = merge_tensor(consensus, zero, vectors)
    assert 0 < (once == 0).sum() < once.numel()
    tiny = merge_tensor(consensus, zero, [vector * 2.0**-60 for vector in vectors])
    assert torch.equal(tiny * 2.0**60, once)


def test_a_trim_over_the_model_is_that_of_one_long_tensor():
    tensors = [make_models((20, 30), 3, seed=1, change=0.01), make_models((500,), 3, seed=2, change=0.1)]
    parameters = {"vector": "ties", "density": 0.3, "k": 1}
    merged = merge_whole_model(consensus, tensors, {**parameters, "trim_over": "model"})
    base = torch.cat([base.reshape(-1) for base, _ in tensors])
    models = [torch.cat([models[i].reshape(-1) for _, models in tensors]) for i in range(3)]
    long = merge_tensor(consensus, base, models, parameters)
    assert torch.equal(torch.cat([result.reshape(-1) for result in merged]), long)
    assert not torch.equal(merged[0], merge_tensor(consensus, *tensors[0], parameters))


def test_a_cut_is_measured_only_where_something_is_trimmed():
    cut = consensus.statistics["cut"]
    assert not cut.wanted({"vector": "sum", "density": (0.2, 0.2)})
    assert not cut.wanted({"vector": "ties", "density": (1.0, 1.0)})
    assert cut.wanted({"vector": "ties", "density": (1.0, 0.2)})
