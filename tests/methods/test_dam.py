"""DAM: one tensor, given its coefficients, the loss and the penalty. How they are learnt is tested in tests/calibration."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.dam import alikeness, dam, divergence
from tests.methods.spectra import make_matrices
from tests.reference.dam import dam as reference


def merged(models, coefficients, **parameters):
    return merge_tensor(dam, None, models, parameters, data={"coefficients": coefficients})


@pytest.mark.parametrize("shape", [(1,), (1, 9), (5, 1)])
def test_agrees_with_the_reference(shape):
    _, models = make_matrices((5, 9), 3, "random")
    coefficients = list(torch.rand(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    expected = reference(models, coefficients)
    torch.testing.assert_close(merged(models, coefficients), expected, rtol=1e-12, atol=1e-12)
    single = merged([model.float() for model in models], [own.float() for own in coefficients])
    assert (single - expected).norm() <= 1e-6 * expected.norm()


def test_a_coefficient_of_one_is_the_model_and_without_any_it_is_the_average():
    _, models = make_matrices((24, 40), 3, "random")
    hot = [torch.full((1, 40), c, dtype=torch.float64) for c in (0.0, 1.0, 0.0)]
    assert torch.equal(merged(models, hot), models[1])
    torch.testing.assert_close(merge_tensor(dam, None, models), sum(models) / 3)


def test_the_divergence_is_that_of_the_softened_predictions():
    generator = torch.Generator().manual_seed(0)
    own, teacher = torch.randn(2, 4, 50, generator=generator, dtype=torch.float64)
    t = torch.tensor(1.7, dtype=torch.float64)
    p, q = (teacher / 1.7).softmax(-1), (own / 1.7).softmax(-1)
    torch.testing.assert_close(divergence(own, teacher, t), 1.7**2 * (p * (p / q).log()).sum(-1))
    assert float(divergence(own, own, t).abs().max()) < 1e-12


def test_the_penalty_by_hand():
    one, two = torch.tensor(0.5), torch.tensor(0.1)
    # cos is 4 / 5, and what is shared is 1 + 0; a single number per model does not count
    pair = torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    found = alikeness([pair, torch.tensor([[2.0], [2.0]])], one, two)
    assert float(found) == pytest.approx(0.5 * -0.8 + 0.1 * 1)
    assert float(alikeness([pair[:1]], one, two)) == 0
