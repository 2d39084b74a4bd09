import pytest
import torch

from merganser.methods.twin import twin
from tests.methods.bars import assert_reaches_bars, error, make_models
from tests.methods.sidecars import assert_bears_degenerate_inputs, restored, stored_bytes
from tests.methods.spectra import KINDS, SHAPES, make_matrices
from tests.reference.twin import twin as reference
from tests.reference.twin import twin_restored as reference_restored


@pytest.mark.parametrize("parameters", [{}, {"lambda": 0.29, "weight": [1.0, 0.5, 2.0]}], ids=str)
def test_reaches_the_bars(parameters):
    base, models = make_models((80, 125), 3)
    assert_reaches_bars(twin, reference, base, models, parameters)


@pytest.mark.parametrize("shape", [*SHAPES, (200, 150)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0.1, 0.5, 1.0])
def test_restores_as_the_reference(shape, kind, rank):
    base, models = (part for part in make_matrices(shape, 3, kind))
    start, own = base.float(), [model.float() for model in models]
    merged, found = restored(twin, start, own, {"rank": rank})
    expected = reference_restored([model.double() for model in own], merged.double(), rank)
    for one, other, model in zip(found, expected, own, strict=True):
        # of what is added to the merged model
        step = (model.double() - merged.double()).norm()
        assert float((one - other).norm() / step) < 1e-4


def test_the_error_is_what_the_rank_leaves():
    base, models = make_matrices((40, 64), 3, "random")
    start, own = base.float(), [model.float() for model in models]
    merged, found = restored(twin, start, own, {"rank": 0.25})
    for one, model in zip(found, own, strict=True):
        values = torch.linalg.svdvals((model - merged).double())
        assert float((one - model).norm()) == pytest.approx(float(values[10:].norm()), rel=1e-5)


def test_a_full_rank_gives_the_models_back():
    base, models = make_matrices((40, 64), 4, "random")
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-7), (torch.bfloat16, 2e-3)):
        own = [model.to(dtype) for model in models]
        for again, model in zip(restored(twin, base.to(dtype), own, {"rank": 1.0})[1], own, strict=True):
            assert again.dtype == dtype
            assert error(again, model.double()) < bound


def test_no_rank_gives_the_merged_model():
    base, models = (part for part in make_matrices((40, 64), 3, "random"))
    merged, found = restored(twin, base.float(), [model.float() for model in models], {"rank": 0.0})
    assert all(torch.equal(again, merged) for again in found)
    # a rank is rounded down: a hundredth of 40 is none
    assert stored_bytes(twin, base, models, {"rank": 0.01}) == (0, 0)


def test_one_model_in_full_needs_nothing_beside_it():
    base, (model,) = make_matrices((40, 64), 1, "random")
    _, (again,) = restored(twin, base.float(), [model.float()], {"lambda": 1.0, "rank": 0.0})
    torch.testing.assert_close(again, model.float(), rtol=0, atol=1e-8)


def test_other_tensors_are_kept_or_left():
    base, models = make_models((125,), 3)
    merged, found = restored(twin, base, models)
    assert all(torch.equal(again, model) for again, model in zip(found, models, strict=True))
    merged, found = restored(twin, base, models, {"others": "merged"})
    assert all(torch.equal(again, merged) for again in found)


def test_a_task_costs_two_factors():
    base, models = make_models((80, 125), 3)
    assert stored_bytes(twin, base, models) == (8 * (80 + 125) * 4, 0)
    low = base.bfloat16(), [model.bfloat16() for model in models]
    assert stored_bytes(twin, *low, {"rank": 0.29}) == (23 * (80 + 125) * 2, 0)


def test_bears_degenerate_inputs():
    assert_bears_degenerate_inputs(twin)
    assert_bears_degenerate_inputs(twin, {"rank": 1.0, "lambda": 0.5})
