import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.nan_merging import nan_merging
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.bars import FLOAT32, assert_reaches_bars, error, make_models
from tests.methods.whole_model import merge_whole_model
from tests.reference.nan_merging import add, factors
from tests.reference.nan_merging import nan_merging as reference


@pytest.mark.parametrize("n", [1, 2, 3, 16])
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(n, change):
    base, models = make_models((80, 125), n, change=change)
    models = [base + (i + 1) * (model - base) for i, model in enumerate(models)]
    assert_reaches_bars(nan_merging, reference, base, models, {"norms_over": "tensor", "lambda": 0.8})


def test_norms_over_the_model_reach_the_bar():
    tensors = [make_models((20, 30), 3, seed=1, change=0.01), make_models((500,), 3, seed=2, change=0.1)]
    tensors[1] = (tensors[1][0], [tensors[1][1][0], tensors[1][0], tensors[1][1][2]])
    factor = factors(tensors)
    merged = merge_whole_model(nan_merging, tensors, {})
    for result, (base, models) in zip(merged, tensors, strict=True):
        assert error(result, add(base, models, factor)) <= FLOAT32
    # which they are not tensor by tensor
    base, models = tensors[0]
    assert error(merge_tensor(nan_merging, base, models), add(base, models, factor)) > 1e-4


def test_by_hand():
    base = torch.zeros(2)
    # lengths 5 and 10: factors 2/3 and 1/3
    models = [torch.tensor([3.0, 4.0]), torch.tensor([10.0, 0.0])]
    found = merge_tensor(nan_merging, base, models, {"lambda": 3.0})
    assert found.tolist() == pytest.approx([6 + 10, 8])


def test_all_task_vectors_come_to_be_equally_long():
    base, (short, long) = make_models((80, 125), 2)
    long = base + 50 * (long - base)
    merged = merge_tensor(nan_merging, base, [short, long]) - base
    units = [(model - base) / (model - base).norm() for model in (short, long)]
    expected = sum(units)
    cosine = (merged * expected).sum() / merged.norm() / expected.norm()
    assert float(cosine) == pytest.approx(1, abs=1e-5)


def test_equal_lengths_are_the_average():
    base, (model, other) = make_models((80, 125), 2)
    other = base + (other - base) * ((model - base).norm() / (other - base).norm())
    expected = merge_tensor(task_arithmetic, base, [model, other], {"weight": 0.5})
    torch.testing.assert_close(merge_tensor(nan_merging, base, [model, other]), expected, rtol=0, atol=1e-7)


def test_models_that_did_not_change_count_nothing():
    base, models = make_models((80, 125), 2)
    expected = merge_tensor(nan_merging, base, models)
    assert torch.equal(merge_tensor(nan_merging, base, [models[0], base, models[1], base]), expected)
    assert torch.equal(merge_tensor(nan_merging, base, [base, models[0]]), merge_tensor(nan_merging, base, models[:1]))
    assert torch.equal(merge_tensor(nan_merging, base, [base] * 4), base)


def test_scaling_the_task_vectors_scales_the_merge():
    base, models = make_models((80, 125), 3)
    zero, vectors = torch.zeros_like(base), [model - base for model in models]
    once = merge_tensor(nan_merging, zero, vectors)
    tiny = merge_tensor(nan_merging, zero, [vector * 2.0**-60 for vector in vectors])
    assert torch.equal(tiny * 2.0**60, once)
