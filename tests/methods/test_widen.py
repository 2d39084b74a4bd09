import math

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.method import Location
from merganser.methods.task_arithmetic import task_arithmetic
from merganser.methods.widen import divergences, widen
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.widen import widen as reference

SETTINGS = [
    {},
    {"ratio": 0.5, "score": 0.7},
    {"ratio": 1.6, "score": 2.0},
    {"normalize": True},
    {"normalize": True, "ratio": 0.0, "score": 0.0},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(widen, reference, base, models, parameters)


@pytest.mark.parametrize("shape", [(), (1,), (500,), (1, 40), (40, 1), (6, 5, 4)])
def test_reaches_the_bars_in_other_shapes(shape):
    base, models = make_models(shape, 3)
    assert_reaches_bars(widen, reference, base, models)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bars_with_other_numbers_of_models(n):
    base, models = make_models((40, 25), n)
    assert_reaches_bars(widen, reference, base, models)


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((2500, 400), 2)
    assert_reaches_bars(widen, reference, base, models)


def test_by_hand():
    base = torch.tensor([[3.0, 1.0, 0.0, 2.0], [4.0, 0.0, 1.0, 0.0]])
    # lengths move by 5, 0, 3 and 1; directions by 0, 1, 0 and 0
    first = torch.tensor([[6.0, 0.0, 0.0, 3.0], [8.0, 1.0, 4.0, 0.0]])
    still = base.clone()
    # ranks of lengths 3 0 2 1, of directions 0 3 1 2, each over 4, with an average of 3 / 8
    length, turn = [0.75, 0, 0.5, 0.25], [0, 0.75, 0.25, 0.5]
    rest = [0, 0.25, 0.5, 0.75]

    def share(own, other):
        return 1.0 if own > 0.375 else math.exp(own) / (math.exp(own) + math.exp(other))

    factor = [(share(a, c) + share(b, c)) / 2 for a, b, c in zip(length, turn, rest, strict=True)]
    expected = base + torch.tensor(factor) * (first - base)
    torch.testing.assert_close(merge_tensor(widen, base, [first, still]), expected)


def test_a_vector_by_hand():
    base = torch.zeros(3)
    models = [torch.tensor([3.0, 0.5, 1.0]), torch.tensor([0.0, -1.0, 0.1])]
    # averages 1.5 and 1.1 / 3
    low = [math.exp(0.5) / (math.exp(0.5) + math.exp(1)), math.exp(1) / (math.exp(1) + math.exp(0.1))]
    last = math.exp(0.1) / (math.exp(1) + math.exp(0.1))
    expected = [3, 0.5 * low[0] - 1, low[1] + 0.1 * last]
    assert merge_tensor(widen, base, models).tolist() == pytest.approx(expected)


def test_rows_of_tables_stand_for_tokens():
    base, models = make_models((40, 25), 2)
    turned = merge_tensor(widen, base.T, [model.T for model in models]).T
    plain = merge_tensor(widen, base, models)
    given = {
        ("embedding", "embedding"): turned,
        ("embedding", "head"): plain,
        ("embedding", "attention"): plain,
        ("both", "head"): turned,
        ("both", "embedding"): turned,
        ("both", "mlp"): plain,
        ("none", "embedding"): plain,
    }
    for (tokens, role), expected in given.items():
        found = merge_tensor(widen, base, models, {"tokens": tokens}, role=role)
        assert torch.equal(found, expected), (tokens, role)
        assert torch.equal(merge_tensor(widen, base, models, {"tokens": tokens}, location=Location(role=role)), found)
    # a convolution is not a table
    base, models = make_models((8, 5, 3), 2)
    assert torch.equal(merge_tensor(widen, base, models, role="embedding"), merge_tensor(widen, base, models))


def test_packed_experts_are_merged_one_by_one():
    base, models = make_models((4, 12, 7), 3)
    packed = merge_tensor(widen, base, models, role="expert")
    each = [merge_tensor(widen, base[i], [model[i] for model in models]) for i in range(4)]
    assert torch.equal(packed, torch.stack(each))
    assert not torch.equal(packed, merge_tensor(widen, base, models))


def test_columns_of_zeros_have_no_direction():
    base, models = make_models((40, 25), 2)
    base[:, 3] = 0
    models[0][:, 3] = models[1][:, 5] = 0
    found = merge_tensor(widen, base, models)
    torch.testing.assert_close(found.double(), reference(base, models), rtol=0, atol=1e-7)
    assert torch.isfinite(merge_tensor(widen, torch.zeros(5, 4), [torch.zeros(5, 4), models[0][:5, :4]])).all()
    length, turn = divergences(base, models[0], False)
    assert (length[3].item(), turn[3].item()) == (0, 0)
    assert divergences(base, models[1], False)[1][[3, 5]].tolist() == [1, 1]


def test_small_turns_are_told_apart():
    # cosines that float64 cannot tell from 1
    step = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * 2.0**-40
    length, turn = divergences(torch.ones(2, 3, dtype=torch.float64), torch.stack([1 + step, 1 - step]), False)
    torch.testing.assert_close(turn, step * step / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(length, step * step / 2**0.5, rtol=1e-6, atol=0)


def test_one_model_is_that_model():
    for shape in ((40, 25), (30,)):
        base, models = make_models(shape, 1)
        torch.testing.assert_close(merge_tensor(widen, base, models), models[0], rtol=0, atol=1e-8)


def test_equal_models_are_added_unless_normalized():
    base, (model,) = make_models((40, 25), 1)
    found = merge_tensor(widen, base, [model] * 3, {"normalize": True})
    torch.testing.assert_close(found, model, rtol=0, atol=1e-8)
    # what matters is added three times; what does not has softmax shares that add up to 1
    added = (merge_tensor(widen, base, [model] * 3) - base) / (model - base)
    assert {round(float(x), 2) for x in added.median(dim=0).values} == {1, 2, 3}
    everything = merge_tensor(widen, base, [model] * 3, {"ratio": 0})
    expected = merge_tensor(task_arithmetic, base, [model] * 3, {"weight": 1})
    # but for the column of the lowest rank
    assert ((everything - expected).abs().amax(dim=0) > 1e-6).sum() <= 2


def test_scaling_all_weights_scales_the_merge():
    base, models = make_models((40, 25), 3)
    once = merge_tensor(widen, base, models)
    tiny = merge_tensor(widen, base * 2.0**-80, [model * 2.0**-80 for model in models])
    assert torch.equal(tiny * 2.0**80, once)
