"""Model Tinting: one tensor, given its coefficients, and the loss. How these are learnt is tested in tests/calibration."""

from __future__ import annotations

import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.model_tinting import confident_loss, model_tinting
from tests.methods.spectra import make_matrices
from tests.reference.model_tinting import loss
from tests.reference.model_tinting import model_tinting as reference


def test_agrees_with_the_reference():
    base, models = make_matrices((5, 9), 3, "random")
    coefficients = [torch.tensor([c], dtype=torch.float64) for c in (-0.2, 0.4, 1.3)]
    expected = reference(base, models, coefficients)
    found = merge_tensor(model_tinting, base, models, data={"coefficients": coefficients})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    alone = merge_tensor(model_tinting, base, models, {"start": 0.25})
    torch.testing.assert_close(alone, reference(base, models, [0.25] * 3))


def test_labels_count_where_the_model_is_surer_or_both_agree():
    generator = torch.Generator().manual_seed(0)
    own, teacher = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    found = confident_loss(own, teacher)
    expected = [float(loss(p, q)) for p, q in zip(own.softmax(-1), teacher.softmax(-1), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert 0 < expected.count(0.0) < 40
