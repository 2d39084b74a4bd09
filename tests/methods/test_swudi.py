import pytest

from merganser.methods.swudi import swudi
from tests.methods.spectra import BARS, KINDS, SHAPES, make_matrices, step_error
from tests.reference.swudi import swudi as reference

SETTINGS = [
    {},
    {"rank": 0.3, "time": 50.0, "start": "zero"},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 5])
def test_reaches_the_bar(parameters, kind, n):
    for shape in SHAPES:
        base, models = make_matrices(shape, n, kind)
        error = step_error(swudi, reference, base, models, parameters)
        assert error <= BARS[kind], (shape, error)
