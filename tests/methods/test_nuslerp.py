import math

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.nuslerp import nuslerp
from merganser.methods.slerp import slerp
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.nuslerp import nuslerp as reference

ROWS = {"nuslerp_flatten": False}
COLUMNS = {"nuslerp_flatten": False, "nuslerp_row_wise": True}


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("axis", [{}, {"nuslerp_row_wise": True}, ROWS, COLUMNS])
@pytest.mark.parametrize("weight", [[0.5, 0.5], [0.9, 0.2], [1.3, -0.2]])
@pytest.mark.parametrize("shape", [(80, 125), (10_000,), (20, 5, 100)])
def test_reaches_the_bars(with_base, axis, weight, shape):
    base, models = make_models(shape, 2, change=0.3)
    assert_reaches_bars(nuslerp, reference, base if with_base else None, models, {"weight": weight, **axis})


@pytest.mark.parametrize("axis", [{}, ROWS, COLUMNS])
def test_reaches_the_bars_on_a_million_elements(axis):
    base, models = make_models((1000, 1000), 2)
    assert_reaches_bars(nuslerp, reference, base, models, {"weight": [0.6, 0.4], **axis})


def test_without_a_base_it_is_slerp():
    base, (model,) = make_models((80, 125), 1, change=1.0)
    weighted = merge_tensor(nuslerp, None, [base, model], {"weight": [0.3, 0.7]})
    torch.testing.assert_close(weighted, merge_tensor(slerp, base, [model], {"t": 0.7}), rtol=1e-6, atol=1e-8)


def test_rows_and_columns_are_those_of_the_transposed():
    base, models = make_models((60, 50), 2)
    across = merge_tensor(nuslerp, base.T, [model.T for model in models], {"weight": [0.3, 0.7], **ROWS})
    down = merge_tensor(nuslerp, base, models, {"weight": [0.3, 0.7], **COLUMNS})
    torch.testing.assert_close(across.T, down, rtol=1e-6, atol=1e-8)


def test_columns_are_measured_over_all_blocks():
    base, models = make_models((60, 50), 2)
    parameters = {"weight": [0.3, 0.7], **COLUMNS}
    whole = merge_tensor(nuslerp, base, models, parameters)
    assert torch.equal(merge_tensor(nuslerp, base, models, parameters, block=50), whole)


@pytest.mark.parametrize("axis", [{}, ROWS, COLUMNS])
def test_a_vector_is_one_vector(axis):
    base, models = make_models((500,), 2)
    merged = merge_tensor(nuslerp, base, models, {"weight": [0.3, 0.7], **axis})
    expected = merge_tensor(nuslerp, base, models, {"weight": [0.3, 0.7]})
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("axis", [{}, ROWS, COLUMNS])
def test_all_weight_on_one_model_gives_it(axis):
    base, models = make_models((60, 50), 2)
    for weight, model in (([1, 0], models[0]), ([0, 1], models[1])):
        merged = merge_tensor(nuslerp, base, models, {"weight": weight, **axis})
        torch.testing.assert_close(merged, model, rtol=1e-6, atol=1e-8)
        assert torch.equal(merge_tensor(nuslerp, None, models, {"weight": weight, **axis}), model)


@pytest.mark.parametrize(
    ("weight", "like"), [([1, -1], [1, 1]), ([1e-7, 3e-7], [1, 1]), ([0.015625, 0.046875], [1, 3])]
)
def test_only_the_ratio_of_weights_counts_until_they_cancel(weight, like):
    base, models = make_models((60, 50), 2)
    merged = merge_tensor(nuslerp, base, models, {"weight": weight})
    assert torch.equal(merged, merge_tensor(nuslerp, base, models, {"weight": like}))


def test_only_the_products_in_use_are_measured():
    for flatten, row_wise, wanted in ((True, False, "whole"), (True, True, "whole"), (False, True, "columns")):
        parameters = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
        assert [name for name, s in nuslerp.statistics.items() if s.wanted(parameters)] == [wanted]
    assert not any(s.wanted({**ROWS, "nuslerp_row_wise": False}) for s in nuslerp.statistics.values())


@pytest.mark.parametrize("axis", [{}, ROWS, COLUMNS])
def test_opposite_task_vectors_take_the_straight_line(axis):
    base, (model, _) = make_models((60, 50), 2, change=0.5)
    model = base + (model - base)
    merged = merge_tensor(
        nuslerp, torch.zeros_like(base), [model - base, base - model], {"weight": [0.75, 0.25], **axis}
    )
    torch.testing.assert_close(merged, (model - base) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("axis", [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}])
@pytest.mark.parametrize("with_base", [False, True])
def test_a_vector_of_zeros_counts_as_at_a_right_angle(axis, with_base):
    """It is the task vector of a tensor that one model left unchanged."""
    origin, (model,) = make_models((60, 50), 1, change=0.5)
    base = origin if with_base else None
    start = origin if with_base else torch.zeros_like(origin)
    for weight, share in (([0.5, 0.5], 0.5**0.5), ([0.75, 0.25], math.sin(math.pi / 8)), ([1, 0], 0.0)):
        merged = merge_tensor(nuslerp, base, [start, model], {"weight": weight, **axis})
        torch.testing.assert_close(merged - start, share * (model - start), rtol=1e-4, atol=1e-6)
    assert torch.equal(merge_tensor(nuslerp, base, [start, start], {"weight": [0.5, 0.5], **axis}), start)
