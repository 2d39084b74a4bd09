"""WUDI against its reference, and laws that hold for all who go down the same function."""

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.aswudi import aswudi
from merganser.methods.optmerge import optmerge
from merganser.methods.swudi import swudi
from merganser.methods.task_arithmetic import task_arithmetic
from merganser.methods.wudi import wudi
from tests.methods.spectra import BARS, KINDS, SHAPES, make_matrices, step_error, steps
from tests.reference.wudi import wudi as reference

FAMILY = [wudi, swudi, aswudi, optmerge]
SETTINGS = [
    {},
    {"time": 20.0, "lambda": 0.3, "start": "mean"},
    {"solver": "adam", "learning_rate": 1e-4, "steps": 30},
    {"solver": "minimum"},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 5])
def test_reaches_the_bar(parameters, kind, n):
    for shape in SHAPES:
        base, models = make_matrices(shape, n, kind)
        error = step_error(wudi, reference, base, models, parameters)
        assert error <= BARS[kind], (shape, error)


def test_by_hand():
    base = torch.zeros(1, 2)
    models = [torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 3.0]])]
    # both tasks look along their own row: C = [[1, 0], [0, 0]] + [[1, 1], [1, 1]] / 2, and both get what they want
    expected = torch.tensor([[2.0, 4.0]])
    torch.testing.assert_close(merge_tensor(wudi, base, models, {"solver": "minimum"}), expected)
    torch.testing.assert_close(merge_tensor(wudi, base, models, {"time": 1e6}), expected)
    half = merge_tensor(wudi, base, models, {"solver": "minimum", "lambda": 0.5})
    torch.testing.assert_close(half, expected / 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_time_is_task_arithmetic_and_much_time_the_minimum(shape):
    base, models = make_matrices(shape, 3, "random")
    total = steps(task_arithmetic, base, models, {"weight": 1})
    least = steps(wudi, base, models, {"solver": "minimum"})
    assert (least - total).norm() > 0.1 * total.norm()
    for method in (wudi, swudi, optmerge):
        torch.testing.assert_close(steps(method, base, models, {"time": 0.0}), total, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(steps(swudi, base, models, {"rank": 0.0}), total, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(steps(wudi, base, models, {"time": 1e9}), least, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(steps(swudi, base, models, {"time": 1e9, "rank": 1.0}), least, rtol=1e-6, atol=1e-9)
    one = {"time": 70.0}
    torch.testing.assert_close(steps(swudi, base, models, {**one, "rank": 1.0}), steps(wudi, base, models, one))
    # the way there is straight in each direction
    left = [(steps(wudi, base, models, {"time": t}) - least).norm() for t in (0.0, 1.0, 10.0, 100.0)]
    assert left == sorted(left, reverse=True)


def test_the_minimum_keeps_experts_that_share_no_rows():
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    deltas = [torch.randn(8, 4, generator=generator, dtype=torch.float64) @ rows[:, i : i + 4].T for i in (0, 4, 8)]
    base = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    models = [base + delta for delta in deltas]
    for method, parameters in ((wudi, {"solver": "minimum"}), (wudi, {}), (aswudi, {})):
        torch.testing.assert_close(steps(method, base, models, parameters), sum(deltas), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_minimum_of_one_model_many_times_is_that_model(shape):
    base, (model,) = make_matrices(shape, 1, "random")
    for method in FAMILY:
        torch.testing.assert_close(steps(method, base, [model]), model - base, rtol=1e-9, atol=1e-12)
    for parameters in ({"solver": "minimum"}, {"solver": "minimum", "start": "zero"}):
        found = steps(wudi, base, [model] * 3, parameters)
        torch.testing.assert_close(found, model - base, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", FAMILY, ids=lambda method: method.name)
def test_who_did_not_change_has_no_say(method):
    base, models = make_matrices((24, 40), 3, "random")
    unchanged = merge_tensor(method, base, [base, base])
    assert torch.equal(unchanged, base)
    rank = {"target": "plain"} if method is optmerge else {}
    found = steps(method, base, [models[0], base], rank)
    assert torch.isfinite(found).all()
    if method is not optmerge:
        # there the rank depends on the number of models
        torch.testing.assert_close(found, steps(method, base, models[:1], rank), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", FAMILY, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (8, 90)])
def test_turning_rows_or_columns_turns_the_merge(method, shape):
    base, models = make_matrices(shape, 3, "random")
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0] for k in shape)
    turned = steps(method, left @ base @ right, [left @ model @ right for model in models])
    torch.testing.assert_close(turned, left @ steps(method, base, models) @ right, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("method", FAMILY, ids=lambda method: method.name)
def test_scaling_the_task_vectors_scales_the_merge(method):
    base, models = make_matrices((24, 40), 3, "random")
    zero = torch.zeros(24, 40)
    deltas = [(model - base).float() for model in models]
    once = merge_tensor(method, zero, deltas)
    assert torch.equal(merge_tensor(method, zero, [delta * 2.0**-70 for delta in deltas]) * 2.0**70, once)


@pytest.mark.parametrize("method", FAMILY, ids=lambda method: method.name)
def test_more_models_than_rows(method):
    base, models = make_matrices((7, 9), 16, "random")
    merged = merge_tensor(method, base.float(), [model.float() for model in models])
    wide = merge_tensor(method, base, models)
    assert (merged - wide).norm() <= 1e-4 * (wide - base).norm()


def test_only_matrices_are_solved():
    base, models = make_matrices((6, 10), 2, "random")
    stacked, pack = torch.stack([base] * 3), [torch.stack([model, base, 2 * model]) for model in models]
    merged = merge_tensor(wudi, stacked, pack, role="expert")
    torch.testing.assert_close(merged[0], merge_tensor(wudi, base, models), rtol=1e-9, atol=1e-12)
    assert torch.equal(merged[1], base)
    assert torch.equal(merge_tensor(wudi, base[0], [model[0] for model in models]), base[0])
    vector = merge_tensor(aswudi, base[0], [model[0] for model in models])
    torch.testing.assert_close(vector, (models[0][0] + models[1][0]) / 2)


def test_adam_sees_the_gradient_of_the_loss_itself():
    # so small that the constant in Adam's denominator counts
    base, models = make_matrices((20, 30), 3, "random", size=1e-8)
    parameters = {"solver": "adam", "learning_rate": 1e-8, "steps": 20}
    zero, deltas = torch.zeros_like(base), [model - base for model in models]
    merged = merge_tensor(wudi, zero, deltas, parameters)
    torch.testing.assert_close(merged, reference(zero, deltas, **parameters), rtol=1e-6, atol=1e-14)
