"""RAIN merging against its reference, and what it preserves."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.merge import plan
from merganser.errors import RecipeError
from merganser.methods.rain import rain
from tests.making import write_llamas
from tests.methods.spectra import KINDS, SHAPES, make_matrices
from tests.reference.rain import rain as reference


def make_rows(columns, tokens=6):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def merged(base, models, rows, **parameters):
    return merge_tensor(rain, base, models, parameters, data={"gram": [rows.T @ rows / len(rows)]})


@pytest.mark.parametrize("parameters", [{}, {"ridge": 0.1}, {"lambda": 0.5, "ridge": 1e-3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(parameters, kind):
    for shape in SHAPES:
        base, models = make_matrices(shape, 2, kind)
        for rows in (make_rows(shape[1]), make_rows(shape[1], 3 * shape[1])):
            expected = reference(base, models, rows, **parameters)
            found = merged(base, models, rows, **parameters)
            assert (found - expected).norm() <= 1e-8 * (expected - base).norm()


def test_outputs_for_chosen_tokens_are_those_of_the_first_model():
    base, models = make_matrices((24, 40), 2, "random")
    rows = make_rows(40)
    found = merged(base, models, rows, ridge=1e-9)
    torch.testing.assert_close(rows @ found.T, rows @ models[0].T, rtol=0, atol=1e-6)
    free = torch.linalg.svd(rows).Vh[6:]
    torch.testing.assert_close(free @ (found - models[0]).T, free @ (models[1] - base).T, rtol=0, atol=1e-6)


def test_a_large_ridge_or_no_inputs_spare_nothing():
    base, models = make_matrices((24, 40), 2, "random")
    whole = models[0] + models[1] - base
    torch.testing.assert_close(merged(base, models, make_rows(40), ridge=1e9), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged(base, models, torch.zeros(1, 40, dtype=torch.float64)), whole)
    torch.testing.assert_close(merge_tensor(rain, base, models), whole)


def test_statistics_are_those_of_the_first_model(tmp_path):
    base, one, two = write_llamas(tmp_path)
    models = [{"model": str(one)}, {"model": str(two)}]
    recipe = {"merge_method": "rain", "base_model": str(base), "models": models}
    with pytest.raises(RecipeError, match=r"models\[0\]: rain needs statistics of this model from data \(gram\)"):
        plan(recipe)
    models[1]["statistics"] = "somewhere"
    with pytest.raises(RecipeError, match=r"models\[1\] statistics: rain uses no statistics of this model"):
        plan(recipe)
