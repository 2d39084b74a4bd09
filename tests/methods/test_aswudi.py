import pytest
import torch

from merganser.methods.aswudi import aswudi, participation
from tests.methods.spectra import BARS, KINDS, SHAPES, make_matrices, step_error
from tests.reference.aswudi import aswudi as reference

SETTINGS = [
    {},
    {"start": "mean", "lambda": 0.5},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 5])
def test_reaches_the_bar(parameters, kind, n):
    for shape in SHAPES:
        base, models = make_matrices(shape, n, kind)
        error = step_error(aswudi, reference, base, models, parameters)
        assert error <= BARS[kind], (shape, error)


def test_participation_counts_equal_directions():
    assert participation(torch.tensor([0.0, 0.0, 2.0, 2.0, 2.0], dtype=torch.float64)) == 3
    assert participation(torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)) == 2
    assert participation(torch.zeros(4, dtype=torch.float64)) == 0
