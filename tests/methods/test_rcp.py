"""RCP-Merging against its reference, and what follows from its definition."""

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.rcp import rcp
from tests.methods.gradients import draw
from tests.methods.spectra import make_matrices
from tests.reference.rcp import rcp as reference


def merged(base, models, fisher, gradient, **parameters):
    return merge_tensor(rcp, base, models, parameters, data={"fisher": fisher, "gradient": gradient})


def case(shape=(9, 14)):
    base, models = make_matrices(shape, 2, "random")
    return base, models, draw(shape, 2), draw(shape, 2, seed=1, signed=True)


@pytest.mark.parametrize("parameters", [{}, {"lambda": 1e7}, {"scale": 0.5, "lambda": 0.0}], ids=str)
def test_agrees_with_the_reference(parameters):
    base, models, fisher, gradient = case()
    expected = reference(base, models, fisher[0], gradient[1], **parameters)
    found = merged(base, models, fisher, gradient, **parameters)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert 0.01 < (found != models[0]).double().mean() < 0.9


def test_by_hand():
    base, models = torch.zeros(3), [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 2.0])]
    fisher, gradient = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([-1.0, -1.0, 1.0])
    # the first entry helps the domain; the second would, at the cost of reasoning; the third does not
    found = merged(base, models, [fisher, fisher * 9], [gradient * -9, gradient], **{"lambda": 3.0})
    assert torch.equal(found, torch.tensor([3.0, 1.0, 1.0]))


def test_every_entry_has_the_task_vector_or_not():
    base, models, fisher, gradient = case()
    found = merged(base, models, fisher, gradient)
    taken = found != models[0]
    torch.testing.assert_close(found[taken], (models[0] + models[1] - base)[taken])


def test_the_more_reasoning_counts_the_less_is_taken():
    base, models, fisher, gradient = case()
    counts = [
        int((merged(base, models, fisher, gradient, **{"lambda": value}) != models[0]).sum())
        for value in (0.0, 1e6, 1e8, 1e16)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > counts[3] == 0
    assert torch.equal(merge_tensor(rcp, base, models), models[0])
