"""AdaMerging: one tensor, given its coefficients, and the loss. How these are learnt is tested in tests/calibration."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.adamerging import adamerging, token_loss
from tests.methods.spectra import make_matrices
from tests.reference.adamerging import adamerging as reference
from tests.reference.adamerging import entropy


def merged(base, models, coefficients, **parameters):
    return merge_tensor(adamerging, base, models, parameters, data={"coefficients": coefficients})


def test_agrees_with_the_reference():
    base, models = make_matrices((5, 9), 3, "random")
    # outside of [0, 1] they are clamped
    coefficients = [torch.tensor([c], dtype=torch.float64) for c in (-0.2, 0.4, 1.3)]
    expected = reference(base, models, coefficients)
    torch.testing.assert_close(merged(base, models, coefficients), expected, rtol=1e-12, atol=1e-12)
    single = merged(base.float(), [model.float() for model in models], [own.float() for own in coefficients])
    assert (single - expected).norm() <= 1e-6 * expected.norm()


def test_a_coefficient_of_one_is_the_model_and_without_any_it_is_task_arithmetic():
    base, models = make_matrices((24, 40), 3, "random")
    hot = [torch.tensor([c], dtype=torch.float64) for c in (0.0, 1.0, 0.0)]
    torch.testing.assert_close(merged(base, models, hot), models[1])
    found = merge_tensor(adamerging, base, models, {"start": 0.2})
    torch.testing.assert_close(found, base + 0.2 * sum(model - base for model in models))


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_the_loss_of_a_token(spread):
    logits = spread * torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([3, 0, 49, 7])
    torch.testing.assert_close(token_loss(logits, labels, "entropy"), entropy(logits))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(token_loss(logits, labels, "likelihood"), expected)
