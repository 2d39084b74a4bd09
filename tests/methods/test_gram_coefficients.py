"""Gram coefficients against their reference, and what follows from their definition."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.gram_coefficients import gram_coefficients
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.inputs import loss, make_grams
from tests.methods.spectra import KINDS, SHAPES, make_matrices
from tests.reference.gram_coefficients import gram_coefficients as reference

SETTINGS = [
    {},
    {"alpha": 0.1, "ridge": 1e-6},
    {"reference": "base", "ridge": 0.3},
    {"normalize": True},
    {"weight": [1.0, 0.25, 3.0], "normalize": True},
]


def merged(base, models, data, **parameters):
    return merge_tensor(gram_coefficients, base, models, parameters, data={"gram": data})


def average(base, models, weight=1.0):
    return merge_tensor(task_arithmetic, base, models, {"weight": weight, "normalize": True})


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(parameters, kind):
    for shape in SHAPES:
        base, models = make_matrices(shape, 3, kind)
        models[1] = base + 5 * (models[1] - base)
        data = make_grams(shape[1], 3)
        expected = reference(base, models, data, **parameters)
        step = (expected - base).norm()
        found = merged(base, models, data, **parameters)
        assert (found - expected).norm() <= 1e-9 * step
        single = merged(
            base.float(), [model.float() for model in models], [gram.float() for gram in data], **parameters
        )
        wide = merged(base.float().double(), [model.float().double() for model in models], data, **parameters)
        # one rounding of the result, and those of the Gram matrices
        assert (single - wide).norm() <= 2e-7 * wide.norm() + 1e-5 * step


def test_by_hand():
    base, models = torch.zeros(1, 2), [torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]])]
    data = [torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 1.0]))]
    # M_1 = [[4, 2], [2, 4]] and M_2 = [[2, 2], [2, 4]]: A = [[6, 4], [4, 8]], b = (6, 6), c = (24, 12) / 32
    found = merged(base, models, data, ridge=1e-9)
    torch.testing.assert_close(found, torch.tensor([[0.75, 1.5]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_one_model_and_equal_models_come_back(normalize):
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    for given in (models[:1], [models[0]] * 3):
        found = merged(base, given, data[: len(given)], normalize=normalize)
        torch.testing.assert_close(found, models[0], rtol=1e-9, atol=1e-12)
    found = merged(base, models[:1], data[:1], reference="base", ridge=1e-12)
    torch.testing.assert_close(found, models[0], rtol=1e-9, atol=1e-12)


def test_models_that_do_not_meet_are_added():
    """Task vectors and inputs on columns of their own."""
    base, models = make_matrices((24, 40), 2, "random")
    data = make_grams(40, 2)
    for own, gram, hidden in zip(models, data, (slice(0, 20), slice(20, 40)), strict=True):
        own[:, hidden] = base[:, hidden]
        gram[hidden] = 0
        gram[:, hidden] = 0
    found = merged(base, models, data, ridge=1e-12)
    torch.testing.assert_close(found, models[0] + models[1] - base, rtol=1e-9, atol=1e-12)


def test_no_other_coefficients_fit_better():
    base, models = make_matrices((24, 40), 3, "random")
    models[2] = base + 0.6 * (models[0] - base) + 0.4 * (models[1] - base) + 0.2 * (models[2] - base)
    data = make_grams(40, 3)
    best = merged(base, models, data, ridge=1e-12)
    least = loss(best, models, data)
    generator = torch.Generator().manual_seed(0)
    near = [
        best + sum(float(0.01 * torch.randn(1, generator=generator)) * (model - base) for model in models)
        for _ in range(20)
    ]
    for other in (average(base, models), base, *models, *near):
        assert least < loss(other, models, data)
    # what the ridge leaves of it is still better than where it pulls to
    for ridge in (1e-3, 0.1, 10.0):
        assert (
            least
            < loss(merged(base, models, data, ridge=ridge), models, data)
            < loss(average(base, models), models, data)
        )


def test_a_large_ridge_leaves_the_average_or_the_base():
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    weight = [1.0, 2.0, 5.0]
    found = merged(base, models, data, ridge=1e12, weight=weight)
    torch.testing.assert_close(found, average(base, models, weight), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged(base, models, data, ridge=1e12, reference="base"), base, rtol=1e-9, atol=1e-12)


def test_normalize_weighs_a_model_by_what_it_changed():
    base, models = make_matrices((24, 40), 3, "random")
    models[1] = base + 5 * (models[1] - base)
    data = make_grams(40, 3)
    changed = [loss(base, [model], [gram]) for model, gram in zip(models, data, strict=True)]
    found = merged(base, models, data, normalize=True, reference="base")
    expected = merged(base, models, data, weight=[1 / own for own in changed], reference="base")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(merged(base, models, data, reference="base"), found, rtol=0, atol=1e-6)


def test_sizes_of_grams_count_only_against_each_other():
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    assert torch.equal(merged(base, models, [gram * 2.0**-40 for gram in data]), merged(base, models, data))
    twice = [data[0] * 2, *data[1:]]
    weighted = merged(base, models, data, weight=[2.0, 1.0, 1.0], reference="base")
    assert torch.equal(weighted, merged(base, models, twice, reference="base"))
    relative = merged(base, models, data, normalize=True)
    torch.testing.assert_close(merged(base, models, twice, normalize=True), relative, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(merged(base, models, data), relative, rtol=0, atol=1e-6)


def test_another_basis_of_inputs_gives_the_same_map():
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    turn = torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    back = torch.linalg.inv(turn)
    # inputs x become turn x
    turned = merged(base @ back, [model @ back for model in models], [turn @ gram @ turn.T for gram in data])
    torch.testing.assert_close(turned @ turn, merged(base, models, data), rtol=1e-8, atol=1e-10)


def test_who_received_no_token_adds_nothing():
    base, models = make_matrices((24, 40), 3, "random")
    first, second, _ = make_grams(40, 3)
    zero = torch.zeros_like(first)
    found = merged(base, models, [first, second, zero], ridge=1e-12)
    # with few outputs of others to keep, its own task vector is only used as far as it helps them
    assert loss(found, models[:2], [first, second]) <= loss(
        merged(base, models[:2], [first, second], ridge=1e-12), models[:2], [first, second]
    )
    torch.testing.assert_close(merged(base, models, [zero] * 3), average(base, models), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged(base, models, [zero] * 3, normalize=True, reference="base"), base)


def test_fewer_tokens_than_inputs_are_borne():
    """The Gram matrices are singular, and equal task vectors make the system singular."""
    base, models = make_matrices((24, 96), 3, "low rank")
    models.append(models[0])
    data = [gram.float() for gram in make_grams(96, 4, tokens=2)]
    found = merged(base, models, data, ridge=1e-12)
    assert torch.isfinite(found).all()
    assert (found - base).norm() < 3 * max((model - base).norm() for model in models)


def test_without_statistics_matrices_are_averaged():
    base, models = make_matrices((24, 40), 3, "random")
    weight = [1.0, 2.0, 5.0]
    found = merge_tensor(gram_coefficients, base, models, {"weight": weight})
    torch.testing.assert_close(found, average(base, models, weight), rtol=1e-9, atol=1e-12)
