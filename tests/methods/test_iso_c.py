import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.iso_c import iso_c
from tests.methods.task_vectors import KINDS, make_vectors, merged_vector, rotated, vector_error
from tests.reference.iso_c import iso_c as reference

SETTINGS = [
    {},
    {"weight": [0.5, -1.0, 2.0], "lambda": 0.7},
    {"divisor": "size"},
    {"divisor": "size", "rank_tolerance": 0.05},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 48), (40, 150), (150, 40), (1, 30)])
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_reaches_the_bar(parameters, shape, kind):
    assert vector_error(iso_c, reference, make_vectors(shape, 3, kind), parameters) < 1e-4


@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bar_with_other_numbers_of_models(n):
    assert vector_error(iso_c, reference, make_vectors((60, 70), n, "random"), {}) < 1e-4


def test_reaches_the_bar_on_a_large_matrix():
    assert vector_error(iso_c, reference, make_vectors((350, 300), 4, "random"), {}) < 1e-5


def test_reaches_the_bar_beside_a_base():
    vectors = make_vectors((60, 70), 3, "random")
    base = make_vectors((60, 70), 1, "random", seed=9)[0] * 30
    assert vector_error(iso_c, reference, vectors, {}, base=base) < 1e-3


def test_by_hand():
    base = torch.full((2, 2), 10.0)
    models = [base + torch.tensor([[3.0, 0.0], [0.0, 0.0]]), base + torch.tensor([[0.0, 0.0], [0.0, -1.0]])]
    # singular values 3 and 1, of mean 2
    assert merge_tensor(iso_c, base, models).tolist() == [[12, 10], [10, 8]]
    assert merge_tensor(iso_c, base, models, {"lambda": 0.5}).tolist() == [[11, 10], [10, 9]]
    # one of them alone: all of it, or half, as there could be two
    assert merge_tensor(iso_c, base, models[:1]).tolist() == [[13, 10], [10, 10]]
    assert merge_tensor(iso_c, base, models[:1], {"divisor": "size"}).tolist() == [[11.5, 10], [10, 10]]
    # what counts as zero stays zero, and takes no part in the mean of the rank
    found = merge_tensor(iso_c, base, models, {"rank_tolerance": 0.5})
    assert found.tolist() == [[13, 10], [10, 10]]


def test_all_singular_values_are_equal_and_their_sum_is_kept():
    vectors = make_vectors((60, 40), 3, "random")
    values = torch.linalg.svdvals(merged_vector(iso_c, vectors).double())
    torch.testing.assert_close(values, values.mean().expand(40), rtol=1e-5, atol=0)
    torch.testing.assert_close(values.sum(), torch.linalg.svdvals(sum(vectors).double()).sum(), rtol=1e-5, atol=0)


def test_twice_is_once():
    once = merged_vector(iso_c, make_vectors((60, 40), 3, "random"))
    torch.testing.assert_close(merged_vector(iso_c, [once]), once, rtol=0, atol=1e-5 * float(once.norm()))


def test_directions_that_nobody_uses_stay_as_they_are():
    vectors = make_vectors((60, 40), 3, "low rank")
    values = torch.linalg.svdvals(merged_vector(iso_c, vectors).double())
    torch.testing.assert_close(values[:9], values[:9].mean().expand(9), rtol=1e-5, atol=0)
    assert values[9:].max() < 1e-5 * values[0]


def test_turning_both_sides_turns_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    left, right = rotated(60), rotated(40)
    there = merged_vector(iso_c, [left @ vector @ right for vector in vectors])
    torch.testing.assert_close(there, left @ merged_vector(iso_c, vectors) @ right, rtol=0, atol=1e-4)


def test_scaling_the_task_vectors_scales_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    once = merged_vector(iso_c, vectors)
    assert torch.equal(merged_vector(iso_c, [vector * 2.0**-40 for vector in vectors]) * 2.0**40, once)


def test_models_that_cancel_give_the_base():
    base = torch.zeros(20, 30)
    vector = make_vectors((20, 30), 1, "random")[0]
    assert torch.equal(merge_tensor(iso_c, base, [vector, -vector]), base)
