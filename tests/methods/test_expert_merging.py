"""Expert Merging: one tensor, given its coefficients. How these are learnt is tested in tests/calibration."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.expert_merging import expert_merging
from tests.methods.spectra import make_matrices
from tests.reference.expert_merging import expert_merging as reference


def merged(base, models, coefficients, **parameters):
    return merge_tensor(expert_merging, base, models, parameters, data={"coefficients": coefficients})


@pytest.mark.parametrize("chunks", [1, 2, 7, 11])
@pytest.mark.parametrize("shape", [(5, 9), (11,)])
def test_agrees_with_the_reference(shape, chunks):
    base, models = make_matrices((5, 9), 3, "random")
    base, models = base.flatten()[: torch.Size(shape).numel()].view(shape), [
        model.flatten()[: torch.Size(shape).numel()].view(shape) for model in models
    ]  # fmt: skip
    coefficients = list(torch.rand(3, chunks, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    expected = reference(base, models, coefficients)
    torch.testing.assert_close(merged(base, models, coefficients), expected, rtol=1e-12, atol=1e-12)
    single = merged(base.float(), [model.float() for model in models], [own.float() for own in coefficients])
    assert (single - expected).norm() <= 1e-6 * expected.norm()


def test_alike_chunks_are_one_and_a_coefficient_of_one_is_the_model():
    base, models = make_matrices((24, 40), 3, "random")
    alike = merged(base, models, [torch.full((7,), c, dtype=torch.float64) for c in (0.2, 0.5, 0.9)])
    one = merged(base, models, [torch.tensor([c], dtype=torch.float64) for c in (0.2, 0.5, 0.9)])
    torch.testing.assert_close(alike, one, rtol=0, atol=0)
    hot = [torch.tensor([c], dtype=torch.float64) for c in (0.0, 1.0, 0.0)]
    torch.testing.assert_close(merged(base, models, hot), models[1])


def test_without_coefficients_it_is_task_arithmetic_with_the_start():
    base, models = make_matrices((24, 40), 3, "random")
    found = merge_tensor(expert_merging, base, models, {"start": 0.3})
    torch.testing.assert_close(found, base + 0.3 * sum(model - base for model in models))
