"""FW-Merging against its reference, and what follows from its definition."""

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.fw import fw
from tests.methods.gradients import draw
from tests.methods.spectra import make_matrices
from tests.reference.fw import fw as reference

SETTINGS = [
    {},
    {"step": 1.0},
    {"selection": "soft"},
    {"selection": "soft", "weight": [0.0, 2.0, 1.0]},
    {"weight": [9.0, 1, 1]},
]


def merged(base, models, gradient, **parameters):
    return merge_tensor(fw, base, models, parameters, data={"gradient": gradient})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_agrees_with_the_reference(parameters, seed):
    base, models = make_matrices((9, 14), 3, "random", seed=seed)
    gradient = draw((9, 14), 3, seed=seed, signed=True)
    (expected,) = reference([base], [[m] for m in models], [[g] for g in gradient], **parameters)
    found = merged(base, models, gradient, **parameters)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_it_goes_towards_the_model_that_lowers_the_loss():
    base, models = make_matrices((9, 14), 3, "random")
    # the loss of every task is the distance to model 1
    gradient = [base - models[1]] * 3
    found = merged(base, models, gradient, step=0.25)
    torch.testing.assert_close(found, base + 0.25 * (models[1] - base), rtol=1e-12, atol=1e-15)
    # a positive factor of the loss changes nothing, a negative one turns the choice around
    assert torch.equal(merged(base, models, [g * 8 for g in gradient], step=0.25), found)
    assert torch.equal(merged(base, models[1:2], [gradient[0] * -1]), base)


def test_soft_takes_one_model_for_each_task():
    base, models = make_matrices((9, 14), 3, "random")
    gradient = [base - model for model in models]
    found = merged(base, models, gradient, selection="soft", step=1.0)
    torch.testing.assert_close(found, sum(models) / 3, rtol=1e-12, atol=1e-15)


def test_steps_reach_the_minimum_of_a_loss():
    """With the step of the textbook, on a loss whose minimum lies between the models."""
    _, models = make_matrices((9, 14), 3, "random")
    goal, point = sum(models) / 3, models[0]
    distances = []
    for t in range(60):
        point = merged(point, models, [point - goal] * 3, step=min(1.0, 2 / (t + 2)))
        distances.append(float((point - goal).norm()))
    assert distances[-1] < 0.05 * distances[0]


def test_without_gradients_the_base_stays():
    base, models = make_matrices((9, 14), 3, "random")
    assert torch.equal(merge_tensor(fw, base, models), base)
