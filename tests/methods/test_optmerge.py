import pytest
import torch

from merganser.methods.optmerge import optmerge
from merganser.methods.wudi import wudi
from tests.methods.spectra import BARS, KINDS, SHAPES, make_matrices, step_error, steps
from tests.reference.optmerge import optmerge as reference
from tests.reference.optmerge import truncated
from tests.reference.wudi import quadratic, vectors

SETTINGS = [
    {},
    {"target": "plain", "start": "mean", "time": 0.58},
    {"solver": "minimum"},
    {"solver": "adam", "learning_rate": 1e-4, "steps": 30},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 5])
def test_reaches_the_bar(parameters, kind, n):
    for shape in SHAPES:
        base, models = make_matrices(shape, n, kind)
        error = step_error(optmerge, reference, base, models, parameters)
        assert error <= BARS[kind], (shape, error)


def test_optmerge_is_wudi_where_nothing_is_cut_off():
    base, models = make_matrices((32, 20), 4, "low rank")
    # rank 3 each, and floor(20 / 4) parts are kept
    for parameters in ({}, {"start": "mean"}, {"solver": "minimum"}):
        plain = steps(optmerge, base, models, {**parameters, "target": "plain"})
        torch.testing.assert_close(plain, steps(wudi, base, models, parameters), rtol=1e-6, atol=1e-10)


def test_the_authors_descent_for_adapters_goes_as_far_as_time_058():
    base, models = make_matrices((20, 30), 3, "random")
    targets = [truncated(delta, 6)[0] for delta in vectors(base, models)]
    deltas = vectors(base, models)
    sources = [truncated(delta, 6)[1] for delta in deltas]
    c, d = quadratic(targets, sources, [delta.norm() for delta in deltas])
    # stochastic gradient descent without chance: 300 steps of 1e-4, momentum 0.9
    point, momentum = sum(deltas) / 3, torch.zeros_like(base)
    for _ in range(300):
        momentum = 0.9 * momentum + 2 * (point @ c - d)
        point = point - 1e-4 * momentum
    k = {"target": "plain", "start": "mean", "time": 0.582}
    # floor(20 / 3) = 6 parts
    found = steps(optmerge, base, models, k)
    start = sum(deltas) / 3
    assert (found - point).norm() < 0.01 * (point - start).norm()
