"""FeatCal: one matrix, given what it receives. How that is measured is tested in tests/calibration."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.featcal import featcal
from merganser.methods.regmean import regmean
from merganser.methods.wudi import wudi
from tests.methods.inputs import make_grams
from tests.methods.spectra import KINDS, SHAPES, make_matrices
from tests.reference.featcal import featcal as reference

SETTINGS = [
    {},
    {"rho": 1.0, "alpha": 1.0, "ridge": 0.5},
    {"alpha": 0.0, "ridge": 1e-3},
    {"weight": [1.0, 0.25, 3.0], "lambda": 1.5},
    {"weight": [1.0, 0.0, 3.0], "lambda": 0.5, "start": "wudi"},
]


def make_moments(columns, n):
    """Moments of inputs x, and of x with inputs y that differ from them."""
    grams = make_grams(columns, n)
    generator = torch.Generator().manual_seed(5)
    turns = [
        torch.eye(columns, dtype=torch.float64)
        + 0.1 * torch.randn(columns, columns, generator=generator, dtype=torch.float64)
        for _ in grams
    ]
    return grams, [gram @ turn.T for gram, turn in zip(grams, turns, strict=True)]


def merged(base, models, grams, crosses, **parameters):
    return merge_tensor(featcal, base, models, parameters, data={"gram": grams, "cross_gram": crosses})


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(parameters, kind):
    for shape in SHAPES:
        base, models = make_matrices(shape, 3, kind)
        grams, crosses = make_moments(shape[1], 3)
        expected = reference(base, models, grams, crosses, **parameters)
        found = merged(base, models, grams, crosses, **parameters)
        assert (found - expected).norm() <= 1e-9 * (expected - base).norm()
        single = merged(base.float(), [m.float() for m in models], *([t.float() for t in own] for own in (grams, crosses)),
                        **parameters)  # fmt: skip
        assert (single - expected).norm() <= 1e-5 * expected.norm()


def test_by_hand():
    base, models = torch.zeros(1, 1), [torch.tensor([[2.0]]), torch.tensor([[4.0]])]
    # x = y = 1: (2 + 4 + ridge 2.2 * 3) / (2 + ridge)
    one = [torch.ones(1, 1)] * 2
    torch.testing.assert_close(merged(base, models, one, one, ridge=1.0), torch.tensor([[12.6 / 3]]))
    # y = 2 x for the second: its outputs are twice as large
    torch.testing.assert_close(
        merged(base, models, one, [torch.ones(1, 1), torch.full((1, 1), 2.0)], ridge=1.0, alpha=1.0),
        torch.tensor([[16.6 / 3]]),
    )


def test_without_ridge_and_other_inputs_it_is_regmean():
    base, models = make_matrices((24, 40), 3, "random")
    grams, _ = make_moments(40, 3)
    unit = [gram / gram.norm() for gram in grams]
    expected = merge_tensor(regmean, base, models, {"alpha": 1.0, "ridge": 1e-12}, data={"gram": unit})
    found = merged(base, models, grams, grams, ridge=1e-12, alpha=0.7)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_strong_ridge_gives_the_anchor_and_equal_models_themselves():
    base, models = make_matrices((24, 40), 3, "random")
    grams, crosses = make_moments(40, 3)
    average = sum(models) / 3
    anchor = base + 2.2 * (average - base)
    torch.testing.assert_close(merged(base, models, grams, crosses, ridge=1e9), anchor, rtol=0, atol=1e-7)
    same = [models[0]] * 3
    torch.testing.assert_close(merged(base, same, grams, grams, rho=1.0), models[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("grams", [None, torch.zeros(40, 40, dtype=torch.float64)])
def test_without_inputs_it_is_the_average(grams):
    base, models = make_matrices((24, 40), 3, "random")
    data = None if grams is None else {"gram": [grams] * 3, "cross_gram": [grams] * 3}
    found = merge_tensor(featcal, base, models, {"lambda": 1.5}, data=data)
    torch.testing.assert_close(found, base + 1.5 * (sum(models) / 3 - base))


def test_starts_where_wudi_ends_without_data():
    base, models = make_matrices((24, 16), 3, KINDS[0])
    found = merge_tensor(featcal, base, models, {"start": "wudi", "rho": 2.0})
    torch.testing.assert_close(found, merge_tensor(wudi, base, models, {}), rtol=1e-4, atol=1e-6)
