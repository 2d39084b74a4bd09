import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.ace import ace, spread
from merganser.methods.wudi import wudi
from tests.methods.spectra import BARS, KINDS, SHAPES, make_matrices, step_error, steps
from tests.reference.ace import ace as reference

SETTINGS = [
    {},
    {"ridge": 1e-5, "lambda": 0.4},
    {"normalize": "always"},
    {"normalize": "always", "refine": 0.1, "ridge": 1e-4, "center": False},
    {"normalize": "always", "refine": 0.0},
    {"center": False},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_reaches_the_bar(parameters, kind, n):
    for shape in SHAPES:
        base, models = make_matrices(shape, n, kind)
        error = step_error(ace, reference, base, models, parameters)
        assert error <= BARS[kind], (shape, error)


def with_sizes(shape, sizes):
    base, models = make_matrices(shape, len(sizes), "random")
    return base, [base + size * (model - base) for size, model in zip(sizes, models, strict=True)]


def test_experts_of_other_sizes_are_normalised():
    # squared norms of about 1e-3, 2e3 and 2.6
    base, models = with_sizes((40, 64), [0.6, 900.0, 30.0])
    auto, always, never = (steps(ace, base, models, {"normalize": how}) for how in ("auto", "always", "never"))
    assert torch.equal(auto, always)
    assert not torch.equal(auto, never)
    assert step_error(ace, reference, base, models) < 1e-3
    alike, others = make_matrices((40, 64), 3, "random")
    found = steps(ace, alike, others, {"normalize": "never"})
    assert torch.equal(steps(ace, alike, others), found)


def test_the_rule_of_heterogeneity_by_hand():
    # logarithms 1, 2, 3: variance 1, squared mean 4
    assert spread(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).exp()) == pytest.approx(0.25)
    assert spread(torch.ones(1, dtype=torch.float64)) == 0


def test_by_hand():
    base = torch.zeros(2, 2)
    models = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, -2.0]])]
    # uncentred, with a ridge of 1: covariances diag(4, 0) and diag(0, 4), A = diag(6, 6) + [[2, 2], [2, 2]], whose
    # inverse is [[8, -2], [-2, 8]] / 60, and the pull is diag(2 * 5, -2 * 5)
    found = merge_tensor(ace, base, models, {"ridge": 1.0, "center": False})
    torch.testing.assert_close(found, torch.tensor([[80.0, -20.0], [20.0, -80.0]]) / 60)
    half = merge_tensor(ace, base, models, {"ridge": 1.0, "center": False, "lambda": 0.5})
    torch.testing.assert_close(half, found / 2)
    # a mean row is all that this model has
    assert not merge_tensor(ace, base, [torch.ones(2, 2)]).any()
    assert merge_tensor(ace, base, [torch.ones(2, 2)], {"center": False}).any()


def test_without_a_prior_and_with_next_to_no_ridge_it_is_the_minimum_of_wudi():
    base, models = make_matrices((40, 64), 3, "random")
    # rows that add up to 0 have no prior
    deltas = [model - base for model in models]
    deltas = [(delta - delta.mean(1, keepdim=True)) / delta.norm() for delta in deltas]
    zero = torch.zeros_like(base)
    minimum = steps(wudi, zero, deltas, {"solver": "minimum", "start": "zero"})
    parameters = {"ridge": 1e-9, "center": False, "normalize": "always", "refine": 0.0}
    torch.testing.assert_close(steps(ace, zero, deltas, parameters), minimum, rtol=0, atol=1e-4 * minimum.abs().max())


def test_a_large_ridge_is_the_average():
    base, models = make_matrices((40, 64), 3, "random")
    average = sum(model - base for model in models) / 3
    found = steps(ace, base, models, {"ridge": 1e9, "center": False})
    torch.testing.assert_close(found, average, rtol=1e-6, atol=1e-12)
    centred = average - average.mean(0)
    torch.testing.assert_close(steps(ace, base, models, {"ridge": 1e9}), centred, rtol=1e-6, atol=1e-12)


def test_directions_that_nobody_uses_stay_as_they_are():
    base, models = make_matrices((60, 40), 3, "low rank")
    values = torch.linalg.svdvals(steps(ace, base, models, {"normalize": "always", "refine": 1.0}))
    assert values[9] < 1e-6 * values[0]
    assert values[8] > 1e-3 * values[0]


@pytest.mark.parametrize("normalize", ["never", "always"])
def test_who_did_not_change_has_no_say(normalize):
    base, models = make_matrices((24, 40), 2, "random")
    parameters = {"normalize": normalize}
    alone = steps(ace, base, models, parameters)
    torch.testing.assert_close(steps(ace, base, [*models, base], parameters), alone, rtol=1e-9, atol=1e-14)
    assert torch.equal(merge_tensor(ace, base, [base, base], parameters), base)


def test_one_row_is_not_centred():
    base, models = make_matrices((1, 40), 2, "random")
    assert steps(ace, base, models).norm() > 0.1 * (models[0] - base).norm()
