"""RegMean++: how a matrix is fitted, given its inputs. How these are measured is tested in tests/calibration."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.regmean_plus import regmean_plus
from tests.methods.inputs import make_grams
from tests.methods.spectra import KINDS, make_matrices
from tests.reference.regmean import regmean as reference


@pytest.mark.parametrize(
    "parameters", [{}, {"alpha": 1.0, "reference": "base", "ridge": 0.1}, {"weight": [1.0, 0.25, 3.0]}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_fitted_as_by_regmean(parameters, kind):
    base, models = make_matrices((24, 40), 3, kind)
    data = make_grams(40, 3)
    expected = reference(base, models, data, **parameters)
    found = merge_tensor(regmean_plus, base, models, parameters, data={"gram": data})
    assert (found - expected).norm() <= 1e-9 * (expected - base).norm()


def test_without_inputs_models_are_averaged():
    base, models = make_matrices((24, 40), 3, "random")
    found = merge_tensor(regmean_plus, base, models, {"weight": [1.0, 2.0, 1.0]})
    torch.testing.assert_close(found, (models[0] + 2 * models[1] + models[2]) / 4)
