import math

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import CheckpointError
from merganser.methods.karcher import karcher
from merganser.methods.nuslerp import nuslerp
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.karcher import karcher as reference


@pytest.mark.parametrize("change", [0.02, 0.5, 3.0])
@pytest.mark.parametrize("parameters", [{}, {"max_iter": 1}, {"max_iter": 100, "tol": 1e-12}, {"tol": 0.1}])
@pytest.mark.parametrize("n", [2, 5])
def test_reaches_the_bars(change, parameters, n):
    _, models = make_models((80, 125), n, change=change)
    # of different lengths, and not evenly spread
    models = [model * (1 + i) + (i == 0) * 0.03 for i, model in enumerate(models)]
    assert_reaches_bars(karcher, reference, None, models, parameters)


def test_reaches_the_bars_on_a_million_elements():
    _, models = make_models((1000, 1000), 4, change=0.3)
    assert_reaches_bars(karcher, reference, None, models)


def test_models_nearer_than_tol_do_not_pull():
    """Four models at one place and one at a right angle: the mean starts 0.245 from the four."""
    models = [torch.tensor([1.0, 0.0])] * 4 + [torch.tensor([0.0, 1.0])]
    start, away = math.atan(1 / 4), 1 / 5 * math.atan(4)
    # with all of them the step is short, and none is made; alone the one takes a long one
    for tol, angle in ((0.24, start), (0.25, start + away)):
        merged = merge_tensor(karcher, None, models, {"tol": tol, "max_iter": 1})
        torch.testing.assert_close(merged, torch.tensor([math.cos(angle), math.sin(angle)]), rtol=1e-5, atol=0)


def test_the_tangents_at_the_mean_add_up_to_zero():
    _, models = make_models((100,), 4, change=3.0)
    merged = merge_tensor(karcher, None, models, {"max_iter": 100, "tol": 1e-12}, compute=torch.float64).double()
    point = merged / merged.norm()
    total = torch.zeros_like(point)
    for model in models:
        unit = model.double() / model.double().norm()
        angle = torch.arccos(point @ unit)
        total += angle / torch.sin(angle) * (unit - (point @ unit) * point)
    start = sum(model.double() / model.double().norm() for model in models)
    assert total.norm() < 1e-5
    # the normalised mean of the directions, where the search starts, is another point
    assert (start / start.norm() - point).norm() > 1e-3


def test_of_two_it_is_half_way_on_the_arc():
    _, models = make_models((80, 125), 2, change=1.0)
    models[1] = models[1] * (models[0].norm() / models[1].norm())
    expected = merge_tensor(nuslerp, None, models, {"weight": [1, 1]})
    torch.testing.assert_close(merge_tensor(karcher, None, models), expected, rtol=1e-5, atol=1e-7)


def test_one_model_is_itself():
    _, models = make_models((80, 125), 1)
    torch.testing.assert_close(merge_tensor(karcher, None, models), models[0], rtol=2e-7, atol=0)


def test_a_model_of_zeros_is_refused_beside_others():
    _, (model,) = make_models((80, 125), 1)
    with pytest.raises(CheckpointError, match=r"^lm\.bias: karcher: model 1 is all zeros"):
        merge_tensor(karcher, None, [model, torch.zeros_like(model)], name="lm.bias")
    zeros = [torch.zeros(5), torch.zeros(5)]
    assert torch.equal(merge_tensor(karcher, None, zeros), zeros[0])


def test_models_without_a_direction_count_in_the_length():
    _, models = make_models((80, 125), 1)
    merged = merge_tensor(karcher, None, [torch.zeros_like(models[0]), models[0]], {"zero_norm": 1e-30})
    torch.testing.assert_close(merged, models[0] / 2, rtol=1e-6, atol=0)


def test_where_directions_cancel_the_search_starts_at_the_first_and_opposite_models_do_not_pull():
    _, (first, other) = make_models((7,), 2, change=3.0)
    merged = merge_tensor(karcher, None, [first, -3 * first])
    torch.testing.assert_close(merged, 2 * first, rtol=1e-6, atol=0)
    models = [first, -first / 3, other, -1.7 * other]
    expected = reference(None, models, max_iter=1)
    assert float(expected @ first.double()) > 0
    merged = merge_tensor(karcher, None, models, {"max_iter": 1})
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-7)


def test_zero_norm_says_what_counts_as_no_direction():
    big, small = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1e-6])
    both = merge_tensor(karcher, None, [big, small])
    torch.testing.assert_close(both, torch.tensor([0.5, 0.5]) * 0.5**0.5, rtol=1e-5, atol=0)
    assert torch.equal(merge_tensor(karcher, None, [big, small], {"zero_norm": 1e-5})[1:], torch.zeros(1))
