import pytest
import torch

from merganser.methods.rmm import components, rmm
from tests.methods.bars import assert_reaches_bars, error, make_models
from tests.methods.sidecars import assert_bears_degenerate_inputs, restored, stored_bytes
from tests.methods.spectra import SHAPES, make_matrices
from tests.reference.rmm import rmm as reference
from tests.reference.rmm import rmm_restored as reference_restored


@pytest.mark.parametrize("parameters", [{}, {"lambda": 0.5, "weight": [1.0, 0.5, 2.0]}], ids=str)
def test_reaches_the_bars(parameters):
    base, models = make_models((80, 125), 3)
    assert_reaches_bars(rmm, reference, base, models, parameters)


@pytest.mark.parametrize("shape", [*SHAPES, (200, 150)], ids=str)
@pytest.mark.parametrize("kind", ["random", "shared"])
@pytest.mark.parametrize("parameters", [{"rank": 4}, {"rank": 8, "basis": 2}, {"rank": 8, "basis": 9}], ids=str)
def test_restores_as_the_reference(shape, kind, parameters):
    base, models = make_matrices(shape, 4, kind)
    start, own = base.float(), [model.float() for model in models]
    merged, found = restored(rmm, start, own, parameters)
    expected = reference_restored(start.double(), [model.double() for model in own], merged.double(), **parameters)
    for one, other, model in zip(found, expected, own, strict=True):
        step = (model.double() - start.double()).norm()
        assert float((one - other).norm() / step) < 1e-3


def test_all_components_give_factors_of_that_rank_back():
    base, models = make_matrices((40, 64), 4, "low rank")
    for n in (2, 3, 4):
        parameters = {"rank": 3, "basis": n - 1}
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            own = [model.to(dtype) for model in models[:n]]
            for again, model in zip(restored(rmm, base.to(dtype), own, parameters)[1], own, strict=True):
                step = (model.double() - base).norm()
                assert float((again - model).norm() / step) < bound * 100
                assert error(again, model.double()) < bound
        if n > 2:
            again = restored(rmm, base, models[:n], {"rank": 3, "basis": n - 2})[1][0]
            assert float((again - models[0]).norm() / (models[0] - base).norm()) > 0.1


def test_components_are_the_best_at_each_position():
    vectors = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for count in (1, 2, 3, 4):
        space = components(vectors, count)
        again = space.mean + (space.codes.unsqueeze(2) @ space.basis).squeeze(2)
        for position in range(7):
            centred = vectors[:, position] - vectors[:, position].mean(dim=0)
            left = torch.linalg.svdvals(centred)[count:]
            off = float((again[:, position] - vectors[:, position]).norm())
            assert off == pytest.approx(float(left.norm()), abs=1e-12)
            gram = space.basis[position] @ space.basis[position].T
            torch.testing.assert_close(gram, torch.eye(count, dtype=torch.float64))


def test_components_of_vectors_that_span_less():
    line = torch.arange(4.0, dtype=torch.float64).view(4, 1, 1) * torch.ones(1, 3, 5, dtype=torch.float64)
    space = components(line, 3)
    assert torch.equal(space.basis[:, 1:], torch.zeros(3, 2, 5, dtype=torch.float64))
    again = space.mean + (space.codes.unsqueeze(2) @ space.basis).squeeze(2)
    torch.testing.assert_close(again, line)
    same = components(torch.ones(4, 3, 5), 2)
    assert not same.basis.any()
    assert not same.codes.any()


def test_the_order_of_the_models_is_that_of_the_tasks():
    base, models = make_matrices((40, 64), 4, "random")
    first = restored(rmm, base, models, {"rank": 6})[1]
    other = restored(rmm, base, models[::-1], {"rank": 6})[1][::-1]
    for one, two in zip(first, other, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_a_task_costs_codes_and_all_of_them_a_basis():
    base, models = make_models((80, 125), 5)
    own, shared = stored_bytes(rmm, base, models, {"rank": 12, "basis": 2})
    assert own == 2 * (80 + 125) * 4
    assert shared == (1 + 2) * 12 * (80 + 125) * 4
    # the published ratio: (p (R + T) + R) / (R T) of the factors
    assert (5 * own + shared) / (5 * 12 * (80 + 125) * 4) == pytest.approx((2 * (12 + 5) + 12) / (12 * 5))


def test_bears_degenerate_inputs():
    assert_bears_degenerate_inputs(rmm)
    assert_bears_degenerate_inputs(rmm, {"rank": 40, "basis": 20})
