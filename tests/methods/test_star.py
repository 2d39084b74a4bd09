import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.star import star
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.task_vectors import KINDS, make_vectors, merged_vector, rotated, vector_error
from tests.reference.star import star as reference

SETTINGS = [
    {},
    {"weight": [0.5, -1.0, 2.0], "lambda": 0.7},
    {"weight": [0.5, -1.0, 2.0], "normalize": False},
    {"eta": 0.9},
    {"eta": 0.0},
    {"eta": 1.0},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 48), (40, 150), (150, 40), (1, 30)])
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_reaches_the_bar(parameters, shape, kind):
    assert vector_error(star, reference, make_vectors(shape, 3, kind), parameters) < 1e-4


@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bar_with_other_numbers_of_models(n):
    assert vector_error(star, reference, make_vectors((60, 70), n, "random"), {}) < 1e-4


def test_reaches_the_bar_on_a_large_matrix():
    assert vector_error(star, reference, make_vectors((500, 400), 2, "random"), {}) < 1e-4


def test_by_hand():
    base = torch.full((3, 3), 10.0)
    model = base + torch.diag(torch.tensor([5.0, -3.0, 2.0]))
    diagonals = {
        eta: merge_tensor(star, base, [model], {"eta": eta}).diagonal().sub(10).tolist() for eta in (0.5, 0.6, 0.9)
    }
    assert diagonals[0.5] == pytest.approx([10, 0, 0])
    assert diagonals[0.6] == pytest.approx([6.25, -3.75, 0])
    assert diagonals[0.9] == pytest.approx([5, -3, 2])
    assert merge_tensor(star, base, [model, base], {"eta": 0.5})[0, 0].item() == pytest.approx(15)


def test_equal_singular_values_are_counted_not_rounded():
    vector = 3 * rotated(40)[:, :10] @ rotated(30, seed=6)[:, :10].T
    for eta, k in ((0.1, 1), (0.4, 4), (0.41, 5), (0.7, 7)):
        values = torch.linalg.svdvals(merged_vector(star, [vector], {"eta": eta}).double())
        torch.testing.assert_close(values[:k], torch.full((k,), 30 / k, dtype=torch.float64), rtol=1e-5, atol=0)
        assert values[k] < 1e-4


def test_the_nuclear_norm_is_restored():
    (vector,) = make_vectors((60, 40), 1, "random")
    norms = [torch.linalg.svdvals(v.double()).sum() for v in (vector, merged_vector(star, [vector]))]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)


def test_all_of_the_norm_is_the_average():
    vectors = make_vectors((60, 40), 3, "random")
    average = merged_vector(task_arithmetic, vectors, {"weight": 1.0, "normalize": True})
    torch.testing.assert_close(merged_vector(star, vectors, {"eta": 1.0}), average, rtol=0, atol=1e-5)


def test_rank_1_is_left_alone():
    vectors = [vector[:, :1] @ vector[:1] for vector in make_vectors((60, 40), 3, "random")]
    average = sum(vectors) / 3
    torch.testing.assert_close(merged_vector(star, vectors), average, rtol=0, atol=1e-5)


def test_turning_both_sides_turns_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    left, right = rotated(60), rotated(40)
    there = merged_vector(star, [left @ vector @ right for vector in vectors])
    torch.testing.assert_close(there, left @ merged_vector(star, vectors) @ right, rtol=0, atol=1e-4)


def test_scaling_the_task_vectors_scales_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    once = merged_vector(star, vectors)
    assert torch.equal(merged_vector(star, [vector * 2.0**-40 for vector in vectors]) * 2.0**40, once)
