import pytest
import torch

from merganser.methods.one_bit import one_bit
from tests.methods.bars import assert_reaches_bars, error, make_models
from tests.methods.sidecars import assert_bears_degenerate_inputs, assert_restores, restored, stored_bytes
from tests.reference.one_bit import one_bit as reference
from tests.reference.one_bit import one_bit_restored as reference_restored

SETTINGS = [{}, {"origin": "merged"}, {"scale_per": "row"}, {"origin": "merged", "scale_per": "row"}]


@pytest.mark.parametrize("parameters", [{}, {"lambda": 0.5, "weight": [1.0, 0.5, 2.0]}], ids=str)
def test_reaches_the_bars(parameters):
    base, models = make_models((80, 125), 3)
    assert_reaches_bars(one_bit, reference, base, models, parameters)


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_restores_as_the_reference(parameters):
    base, models = make_models((80, 125), 3)
    assert_restores(one_bit, reference_restored, base, models, parameters)


def test_restores_by_hand():
    base = torch.full((2, 3), 10.0)
    model = base + torch.tensor([[1.0, -2.0, 0.0], [3.0, 3.0, -3.0]])
    assert restored(one_bit, base, [model])[1][0].tolist() == [[12, 8, 12], [12, 12, 8]]
    assert restored(one_bit, base, [model], {"scale_per": "row"})[1][0].tolist() == [[11, 9, 11], [13, 13, 7]]


def test_the_scale_is_the_best():
    base, models = make_models((80, 125), 3)
    for again, model in zip(restored(one_bit, base, models)[1], models, strict=True):
        delta = (model - base).double()
        best = float((delta - delta.abs().mean() * delta.sign()).norm())
        assert float((again - model).norm()) == pytest.approx(best, rel=1e-5)
        for share in (0.99, 1.01):
            assert float((delta - share * delta.abs().mean() * delta.sign()).norm()) > best


def test_a_change_of_one_size_comes_back():
    base, _ = make_models((80, 125), 1)
    model = base + torch.where(torch.arange(80 * 125).view(80, 125) % 3 == 0, 0.25, -0.25)
    torch.testing.assert_close(restored(one_bit, base, [model])[1][0], model, rtol=0, atol=1e-7)
    rows = base + torch.arange(80.0).unsqueeze(1) * 0.01
    torch.testing.assert_close(restored(one_bit, base, [rows], {"scale_per": "row"})[1][0], rows, rtol=0, atol=1e-6)


def test_a_scale_per_row_is_never_worse():
    base, models = make_models((80, 125), 3)
    models = [base + (model - base) * torch.arange(80).unsqueeze(1) for model in models]
    once, rows = (restored(one_bit, base, models, {"scale_per": per})[1] for per in ("tensor", "row"))
    for one, other, model in zip(once, rows, models, strict=True):
        assert error(other, model.double()) < 0.9 * error(one, model.double())


def test_scaling_the_task_vectors_scales_what_is_restored():
    base = torch.zeros(80, 125)
    vectors = make_models((80, 125), 3)[1]
    once = restored(one_bit, base, vectors)[1]
    tiny = restored(one_bit, base, [vector * 2.0**-40 for vector in vectors])[1]
    assert all(torch.equal(a * 2.0**40, b) for a, b in zip(tiny, once, strict=True))


def test_from_the_merged_model_what_is_common_costs_nothing():
    base, models = make_models((80, 125), 1)
    common = models[0] - base
    own = [models[0] + common * 0.1 * sign for sign in (1, -1)]
    near, far = (restored(one_bit, base, own, {"origin": origin})[1] for origin in ("merged", "base"))
    assert error(near[0] - base, (own[0] - base).double()) < 0.2 * error(far[0] - base, (own[0] - base).double())


def test_a_task_costs_a_bit_per_element_and_a_number():
    base, models = make_models((80, 125), 3)
    assert stored_bytes(one_bit, base, models) == (80 * 125 / 8 + 8, 0)
    assert stored_bytes(one_bit, base, models, {"scale_per": "row"}) == (80 * 125 / 8 + 80 * 4, 0)


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_bears_degenerate_inputs(parameters):
    assert_bears_degenerate_inputs(one_bit, parameters)
