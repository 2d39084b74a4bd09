"""Expert Merging as published: one tensor, given its coefficients. How these are learnt is tested in tests/calibration."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.expert_merging_whole import expert_merging_whole, first_value, pull
from tests.methods.spectra import make_matrices
from tests.reference.expert_merging_whole import expert_merging_whole as reference


def merged(base, models, coefficients, **parameters):
    return merge_tensor(expert_merging_whole, base, models, parameters, data={"coefficients": coefficients})


@pytest.mark.parametrize("chunks", [1, 2, 7, 45])
def test_agrees_with_the_reference(chunks):
    base, models = make_matrices((5, 9), 3, "random")
    raw = list(torch.randn(3, chunks, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    expected = reference(base, models, raw)
    torch.testing.assert_close(merged(base, models, raw), expected, rtol=1e-12, atol=1e-12)
    single = merged(base.float(), [model.float() for model in models], [own.float() for own in raw])
    assert (single - expected).norm() <= 1e-6 * expected.norm()


def test_with_first_values_as_without_coefficients_it_is_task_arithmetic_with_the_start():
    base, models = make_matrices((24, 40), 3, "random")
    expected = base + 0.3 * sum(model - base for model in models)
    torch.testing.assert_close(merge_tensor(expert_merging_whole, base, models, {"start": 0.3}), expected)
    first = torch.tensor([first_value(torch.tensor(0.3, dtype=torch.float64))] * 5, dtype=torch.float64)
    torch.testing.assert_close(merged(base, models, [first] * 3), expected)


def test_the_pull_is_a_mean_over_tensors_and_chunks_and_a_sum_over_models():
    start, regulariser = torch.tensor(0.1), torch.tensor(2.0)
    first = first_value(start)
    assert float(pull([torch.full((3, 4), first)], start, regulariser)) == 0.0
    far = torch.logit(torch.tensor([[0.3, 0.1], [0.1, 0.6]]))
    found = pull([far, torch.full((2, 1), first)], start, regulariser)
    torch.testing.assert_close(found, torch.tensor(2.0 * (0.1 + 0.25) / 2))
