import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import ParameterError
from merganser.methods.cabs import cabs
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.cabs import cabs as reference

SETTINGS = [
    {},
    {"n": 8, "m": 32},
    {"n": 8, "m": 32, "tail": "drop"},
    {"n": 2, "m": 5, "weight": [1.2, -0.4, 0.7], "lambda": 0.5},
    {"n": 3, "m": 5},
    {"n": 1, "m": 1},
    {"n": 64, "m": 125},
]


def reference_of(base, models, **parameters):
    return reference(base, models, **{"lambda_" if k == "lambda" else k: v for k, v in parameters.items()})


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(cabs, reference_of, base, models, parameters)


@pytest.mark.parametrize("shape", [(), (1,), (500,), (1, 40), (40, 1), (6, 5, 4), (8, 512)])
def test_reaches_the_bars_in_other_shapes(shape):
    base, models = make_models(shape, 3)
    assert_reaches_bars(cabs, reference_of, base, models)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bars_with_other_numbers_of_models(n):
    base, models = make_models((40, 25), n)
    assert_reaches_bars(cabs, reference_of, base, models, {"n": 2, "m": 8})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1024), 2)
    assert_reaches_bars(cabs, reference_of, base, models)


def test_by_hand():
    base = torch.zeros(2, 5)
    first = torch.tensor([[4.0, -1.0, 2.0, 3.0, 1.0], [0.0, 0.0, -1.0, -5.0, 9.0]])
    other = torch.tensor([[9.0, 2.0, -3.0, 8.0, 7.0], [2.0, 3.0, -6.0, -7.0, 8.0]])

    def merged(*models, **given):
        return merge_tensor(cabs, base, list(models), {"n": 1, "m": 2, **given}).tolist()

    # groups of two, and half of an element at the end, rounded up
    assert merged(first) == [[4, 0, 0, 3, 1], [0, 0, 0, -5, 9]]
    assert merged(first, tail="drop") == [[4, 0, 0, 3, 0], [0, 0, 0, -5, 0]]
    # what the first left: nothing changed in one group of it
    assert merged(first, other) == [[4, 2, -3, 3, 1], [0, 3, -6, -5, 9]]
    assert merged(other, first) == [[9, -1, 2, 8, 7], [0, 3, -1, -7, 8]]
    assert merged(first, other, weight=[1, 10], **{"lambda": 0.5}) == [[2, 10, -15, 1.5, 0.5], [0, 15, -30, -2.5, 4.5]]
    # groups do not go over the end of a row
    assert merged(first, n=1, m=5) == [[4, 0, 0, 0, 0], [0, 0, 0, 0, 9]]


def test_models_never_overlap_and_take_what_they_may():
    base, models = make_models((16, 256), 4)
    # each has the same signs and sizes everywhere, so that whose an element is can be told
    vectors = [(model - base).sign() * 10.0**-i for i, model in enumerate(models)]
    found = merge_tensor(cabs, torch.zeros_like(base), vectors, {"n": 8, "m": 32})
    for i in range(4):
        counts = (found.abs() == 10.0**-i).view(16, 8, 32).sum(dim=2)
        assert (counts == 8).all(), i
    # later models find less
    found = merge_tensor(cabs, torch.zeros_like(base), vectors, {"n": 20, "m": 32})
    assert [int((found.abs() == 10.0**-i).sum()) for i in range(4)] == [16 * 8 * k for k in (20, 12, 0, 0)]


def test_what_the_first_takes_does_not_depend_on_the_others():
    base, models = make_models((80, 125), 3)
    alone = merge_tensor(cabs, base, models[:1])
    together = merge_tensor(cabs, base, models)
    kept = alone != base
    assert torch.equal(together[kept], alone[kept])
    assert not torch.equal(together, alone)


def test_elements_that_did_not_change_are_left_to_others():
    base = torch.zeros(4)
    first = torch.tensor([0.0, 0.0, 1.0, 0.0])
    other = torch.tensor([5.0, 6.0, 7.0, 8.0])
    assert merge_tensor(cabs, base, [first, other], {"n": 3, "m": 4}).tolist() == [5, 6, 1, 8]


def test_one_model_of_which_all_is_kept_is_task_arithmetic():
    base, models = make_models((80, 125), 1)
    expected = merge_tensor(task_arithmetic, base, models, {"weight": 0.7})
    for given in ({"n": 256, "m": 256}, {"n": 1, "m": 1}, {"n": 7, "m": 7}):
        assert torch.equal(merge_tensor(cabs, base, models, {**given, "weight": 0.7}), expected)


def test_equal_models_count_once():
    base, (model,) = make_models((80, 128), 1)
    both = merge_tensor(cabs, base, [model] * 2, {"n": 16, "m": 32})
    torch.testing.assert_close(both, model, rtol=0, atol=1e-8)
    assert torch.equal(merge_tensor(cabs, base, [base] * 3), base)


def test_scaling_the_task_vectors_scales_the_merge():
    base, models = make_models((80, 125), 3)
    zero, vectors = torch.zeros_like(base), [model - base for model in models]
    once = merge_tensor(cabs, zero, vectors)
    tiny = merge_tensor(cabs, zero, [vector * 2.0**-80 for vector in vectors])
    assert torch.equal(tiny * 2.0**80, once)


def test_more_than_a_group_has_is_refused():
    base, models = make_models((3,), 2)
    with pytest.raises(ParameterError, match="n must be at most m, 32, got 64"):
        merge_tensor(cabs, base, models, {"m": 32})
