import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.iso_c import iso_c
from merganser.methods.subspace_boosting import subspace_boosting
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.task_vectors import KINDS, make_vectors, merged_vector, rotated, vector_error
from tests.reference.subspace_boosting import subspace_boosting as reference

SETTINGS = [
    {},
    {"beta": 0.5, "weight": [0.5, -1.0, 2.0], "lambda": 0.7},
    {"normalize": False},
    {"beta": 0.9, "rank_tolerance": 0.05},
    {"beta": 0.0},
    {"beta": 1.0},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 48), (40, 150), (150, 40), (1, 30)])
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_reaches_the_bar(parameters, shape, kind):
    assert vector_error(subspace_boosting, reference, make_vectors(shape, 3, kind), parameters) < 1e-4


@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bar_with_other_numbers_of_models(n):
    assert vector_error(subspace_boosting, reference, make_vectors((60, 70), n, "random"), {"beta": 0.3}) < 1e-4


def test_reaches_the_bar_on_a_large_matrix():
    assert vector_error(subspace_boosting, reference, make_vectors((350, 300), 4, "random"), {"beta": 0.3}) < 1e-5


def test_by_hand():
    base = torch.full((3, 3), 10.0)
    models = [base + torch.diag(torch.tensor([5.0, 0.0, 1.0])), base + torch.diag(torch.tensor([0.0, -4.0, 0.0]))]
    # of 10, the first makes up half, and the first two nine tenths
    for beta, expected in ((0.3, (5, 5, 5)), (0.5, (5, 5, 5)), (0.51, (5, 4, 4)), (0.9, (5, 4, 4)), (0.91, (5, 4, 1))):
        merged = merge_tensor(subspace_boosting, base, models, {"beta": beta, "normalize": False})
        assert merged.diagonal().tolist() == pytest.approx([10 + expected[0], 10 - expected[1], 10 + expected[2]])
    # the mean of two is half of their sum
    merged = merge_tensor(subspace_boosting, base, models, {"beta": 0.51})
    assert merged.diagonal().tolist() == pytest.approx([12.5, 8, 12])


def test_a_beta_of_1_is_task_arithmetic_and_of_0_isotropic():
    vectors = make_vectors((60, 40), 3, "random")
    parameters = {"weight": [0.5, 0.7, -0.3], "lambda": 0.4, "normalize": False}
    expected = merged_vector(task_arithmetic, vectors, parameters)
    found = merged_vector(subspace_boosting, vectors, {**parameters, "beta": 1.0})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    equal = merged_vector(subspace_boosting, vectors, {**parameters, "beta": 0.0})
    isotropic = merged_vector(iso_c, vectors, {"weight": parameters["weight"]})
    torch.testing.assert_close(equal / equal.norm(), isotropic / isotropic.norm(), rtol=0, atol=1e-5)
    assert float(torch.linalg.matrix_norm(equal, 2)) == pytest.approx(
        float(torch.linalg.matrix_norm(expected, 2)), rel=1e-5
    )


def test_directions_that_nobody_uses_stay_as_they_are():
    vectors = make_vectors((60, 40), 3, "low rank")
    values = torch.linalg.svdvals(merged_vector(subspace_boosting, vectors).double())
    torch.testing.assert_close(values[:9], values[:1].expand(9), rtol=1e-5, atol=0)
    assert values[9:].max() < 1e-5 * values[0]


def test_turning_both_sides_turns_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    left, right = rotated(60), rotated(40)
    there = merged_vector(subspace_boosting, [left @ vector @ right for vector in vectors], {"beta": 0.3})
    torch.testing.assert_close(
        there, left @ merged_vector(subspace_boosting, vectors, {"beta": 0.3}) @ right, rtol=0, atol=1e-3
    )


def test_scaling_the_task_vectors_scales_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    once = merged_vector(subspace_boosting, vectors)
    assert torch.equal(merged_vector(subspace_boosting, [vector * 2.0**-40 for vector in vectors]) * 2.0**40, once)


def test_models_that_cancel_give_the_base():
    vector = make_vectors((20, 30), 1, "random")[0]
    assert torch.equal(merge_tensor(subspace_boosting, torch.zeros(20, 30), [vector, -vector]), torch.zeros(20, 30))
