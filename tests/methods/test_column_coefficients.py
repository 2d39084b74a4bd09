"""Column coefficients against their reference, and what follows from their definition."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.column_coefficients import column_coefficients, quadratic_form
from tests.methods.inputs import loss, make_grams
from tests.methods.spectra import make_matrices
from tests.reference.column_coefficients import column_coefficients as reference


def merged(base, models, data, **parameters):
    return merge_tensor(column_coefficients, base, models, parameters, data={"gram": data})


@pytest.mark.parametrize("parameters", [{}, {"ridge": 0.3}, {"weight": [1.0, 0.25, 3.0]}], ids=str)
def test_agrees_with_the_reference(parameters):
    base, models = make_matrices((12, 20), 3, "random")
    models[1] = base + 5 * (models[1] - base)
    data = make_grams(20, 3)
    expected = reference(base, models, data, **parameters)
    found = merged(base, models, data, steps=1000, **parameters)
    assert (found - expected).norm() <= 1e-8 * (expected - base).norm()


@pytest.mark.parametrize("rows", [2, 12, 40])
def test_products_formed_once_multiply_as_every_step_does(rows):
    _, vectors = make_matrices((rows, 20), 3, "random")
    inputs = sum(make_grams(20, 3))
    c = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([sum((a.T @ b * inputs) @ own for b, own in zip(vectors, c, strict=True)) for a in vectors])
    # 2 rows: the six products would be larger than eight times the task vectors
    for steps in (1, 100):
        form = quadratic_form(vectors, inputs, steps)
        assert form.__name__ == ("combined" if steps == 100 and rows > 2 else "multiplied")
        torch.testing.assert_close(form(c), expected, rtol=1e-11, atol=1e-11)


def test_by_hand():
    base, models = torch.zeros(1, 2), [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
    # only the first model's inputs reach the first column: it is kept whole; the second counts three to one
    data = [torch.diag(torch.tensor([1.0, 1.0])), torch.diag(torch.tensor([0.0, 3.0]))]
    torch.testing.assert_close(merged(base, models, data, ridge=1e-9), torch.tensor([[1.0, 1.5]]))


def test_one_model_and_equal_models_come_back():
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    for given in (models[:1], [models[0]] * 3):
        torch.testing.assert_close(merged(base, given, data[: len(given)]), models[0], rtol=1e-9, atol=1e-12)


def test_every_step_fits_better_than_the_average():
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    average = sum(models) / 3
    losses = [float(loss(merged(base, models, data, steps=n, ridge=1e-6), models, data)) for n in (1, 3, 10, 100)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < loss(average, models, data)


def test_without_tokens_or_statistics_it_is_the_average():
    base, models = make_matrices((24, 40), 3, "random")
    zero = [torch.zeros(40, 40, dtype=torch.float64)] * 3
    torch.testing.assert_close(merged(base, models, zero), sum(models) / 3, rtol=1e-9, atol=1e-12)
    found = merge_tensor(column_coefficients, base, models, {})
    torch.testing.assert_close(found, sum(models) / 3, rtol=1e-9, atol=1e-12)
