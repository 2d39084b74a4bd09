"""FW-Merging: one tensor, given its coefficients, and a step. The steps of a model are tested in tests/calibration."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.fw import fw, token_loss, towards
from tests.methods.gradients import draw
from tests.methods.spectra import make_matrices
from tests.reference.fw import fw as reference
from tests.reference.fw import moved


def merged(base, models, values):
    return merge_tensor(fw, base, models, {}, data={"coefficients": list(values)})


def stepped(base, models, gradients, values, *, number=0, rate=0.1, selection="hard"):
    """The coefficients after a step, given the gradient of every loss with respect to the weights."""
    of_values = torch.stack([torch.stack([(g * (model - base)).sum()[None] for model in models]) for g in gradients])
    return towards(values, of_values, number, torch.tensor(rate, dtype=torch.float64), selection)


def evenly(count, value=0.3):
    return torch.full((count, 1), value, dtype=torch.float64)


def test_agrees_with_the_reference():
    base, models = make_matrices((5, 9), 3, "random")
    values = torch.tensor([[0.0], [0.4], [0.7]], dtype=torch.float64)
    torch.testing.assert_close(merged(base, models, values), reference(base, models, values), rtol=1e-12, atol=1e-12)
    found = merge_tensor(fw, base, models, {"start": 0.2})
    torch.testing.assert_close(found, base + 0.2 * sum(model - base for model in models))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("selection", ["hard", "soft"])
def test_a_step_moves_the_merge_as_the_reference(selection, seed):
    base, models = make_matrices((9, 14), 3, "random", seed=seed)
    gradients = draw((9, 14), 3, seed=seed, signed=True)
    before = merged(base, models, evenly(3))
    (expected,) = moved([before], [[m] for m in models], [[g] for g in gradients], 0.1 * 2 / 5, selection=selection)
    after = stepped(base, models, gradients, evenly(3), number=3, selection=selection)
    torch.testing.assert_close(merged(base, models, after), expected, rtol=1e-11, atol=1e-13)


def test_it_goes_towards_the_model_that_lowers_the_loss():
    base, models = make_matrices((9, 14), 3, "random")
    # the loss of every task is the distance to model 1
    gradients = [base - models[1]] * 3
    start = evenly(3, 0.0)
    found = stepped(base, models, gradients, start, rate=0.25)
    torch.testing.assert_close(found, torch.tensor([[0.0], [0.25], [0.0]], dtype=torch.float64))
    # a positive factor of the loss changes nothing, a negative one leaves no model that lowers it
    assert torch.equal(stepped(base, models, [g * 8 for g in gradients], start, rate=0.25), found)
    assert torch.equal(stepped(base, models[1:2], [-gradients[0]], start[:1]), start[:1])


def test_soft_takes_one_model_for_each_loss():
    base, models = make_matrices((9, 14), 3, "random")
    gradients = [base - model for model in models]
    found = stepped(base, models, gradients, evenly(3, 0.0), selection="soft", rate=1.0)
    torch.testing.assert_close(found, evenly(3, 1 / 3))
    # two losses that want the same model take it once
    found = stepped(base, models, [gradients[0], gradients[0], gradients[2]], evenly(3), selection="soft", rate=1.0)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))


def test_steps_reach_the_minimum_of_a_loss():
    """With the steps of the textbook, on a loss whose minimum lies between the models."""
    base, models = make_matrices((9, 14), 3, "random")
    goal, values = sum(models) / 3, torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    first = float((merged(base, models, values) - goal).norm())
    for number in range(60):
        slope = merged(base, models, values) - goal
        values = stepped(base, models, [slope] * 3, values, number=number, rate=1.0)
    assert float((merged(base, models, values) - goal).norm()) < 0.05 * first


def test_the_loss_of_a_token():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([3, 0, 49, 7])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(token_loss(logits, labels), expected)
