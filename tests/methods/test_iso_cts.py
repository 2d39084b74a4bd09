import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.iso_c import iso_c
from merganser.methods.iso_cts import common_rank, iso_cts
from tests.methods.task_vectors import KINDS, make_vectors, merged_vector, rotated, vector_error
from tests.reference.iso_cts import iso_cts as reference

SETTINGS = [
    {},
    {"weight": [0.5, -1.0, 2.0], "lambda": 0.7},
    {"common_space_fraction": 0.3},
    {"common_space_fraction": 0.0, "divisor": "rank"},
    {"common_space_fraction": 1.0},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 48), (40, 150), (150, 40), (1, 30)])
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_reaches_the_bar(parameters, shape, kind):
    error = vector_error(iso_cts, reference, make_vectors(shape, 3, kind), parameters)
    assert error < (1e-2 if kind == "conditioned" else 1e-3)


@pytest.mark.parametrize("n", [1, 2, 16])
@pytest.mark.parametrize("shape", [(60, 70), (10, 70)])
def test_reaches_the_bar_with_other_numbers_of_models(n, shape):
    assert vector_error(iso_cts, reference, make_vectors(shape, n, "random"), {}) < 1e-4


@pytest.mark.parametrize("shape", [(350, 300), (300, 350)])
def test_reaches_the_bar_on_a_large_matrix(shape):
    assert vector_error(iso_cts, reference, make_vectors(shape, 4, "random"), {}) < 1e-3


def test_the_common_space_leaves_what_can_be_divided_evenly():
    assert common_rank(100, 4, 0.8) == (80, 5)
    assert common_rank(100, 3, 0.8) == (79, 7)
    # half to even, as published
    assert common_rank(100, 8, 0.8) == (84, 2)
    assert common_rank(10, 4, 0.8) == (10, 0)
    assert common_rank(100, 3, 1.0) == (100, 0)
    # published code asks for 4 directions of 3
    assert common_rank(3, 2, 0.0) == (1, 1)
    assert common_rank(1, 16, 0.8) == (1, 0)


def test_by_hand():
    base = torch.zeros(2, 2)
    models = [torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, -2.0]])]
    # the sum has 5 and 2: one direction is common, and half of one is each model's, rounded to none
    found = merge_tensor(iso_cts, base, models, {"common_space_fraction": 0.5})
    torch.testing.assert_close(found, torch.tensor([[3.5, 0.0], [0.0, -3.5]]))
    # nothing is common; the models' own leading directions are 4 and 2
    found = merge_tensor(iso_cts, base, models, {"common_space_fraction": 0.0})
    torch.testing.assert_close(found, torch.tensor([[3.0, 0.0], [0.0, -3.0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_with_nothing_but_common_directions_it_is_iso_c(kind):
    vectors = make_vectors((60, 40), 3, kind)
    one = merged_vector(iso_c, vectors)
    two = merged_vector(iso_cts, vectors, {"common_space_fraction": 1.0})
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4 * float(one.norm()))


def test_all_singular_values_are_equal():
    for shape in ((60, 40), (40, 60)):
        values = torch.linalg.svdvals(merged_vector(iso_cts, make_vectors(shape, 3, "random")).double())
        torch.testing.assert_close(values, values.mean().expand(40), rtol=1e-4, atol=0)


def test_a_task_vector_inside_of_the_common_space_adds_nothing():
    # one model of rank 3: its three directions are common, and what is left of it is rounding
    vectors = make_vectors((60, 40), 1, "low rank")
    values = torch.linalg.svdvals(merged_vector(iso_cts, vectors).double())
    assert values[2] > 0.99 * values[0]
    assert values[3] < 1e-5 * values[0]


def test_models_that_cancel_keep_their_own_directions():
    vector = make_vectors((20, 30), 1, "low rank")[0]
    merged = merged_vector(iso_cts, [vector, -vector])
    assert torch.isfinite(merged).all()


def test_turning_both_sides_turns_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    left, right = rotated(60), rotated(40)
    there = merged_vector(iso_cts, [left @ vector @ right for vector in vectors])
    torch.testing.assert_close(there, left @ merged_vector(iso_cts, vectors) @ right, rtol=0, atol=1e-3)


def test_scaling_the_task_vectors_scales_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    once = merged_vector(iso_cts, vectors)
    scaled = merged_vector(iso_cts, [vector * 2.0**-40 for vector in vectors]) * 2.0**40
    torch.testing.assert_close(scaled, once, rtol=0, atol=1e-5)
