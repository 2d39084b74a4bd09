import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.task_arithmetic import task_arithmetic
from merganser.methods.tsv_m import tsv_m
from tests.methods.task_vectors import KINDS, make_vectors, merged_vector, rotated, vector_error
from tests.reference.tsv_m import tsv_m as reference

SETTINGS = [{}, {"weight": [0.5, -1.0, 2.0], "lambda": 0.7}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 48), (40, 150), (150, 40), (1, 30)])
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_reaches_the_bar(parameters, shape, kind):
    assert vector_error(tsv_m, reference, make_vectors(shape, 3, kind), parameters) < 1e-3


@pytest.mark.parametrize("n", [1, 2, 16])
@pytest.mark.parametrize("shape", [(60, 70), (10, 70)])
def test_reaches_the_bar_with_other_numbers_of_models(n, shape):
    assert vector_error(tsv_m, reference, make_vectors(shape, n, "random"), {}) < 1e-4


def test_reaches_the_bar_on_a_large_matrix():
    assert vector_error(tsv_m, reference, make_vectors((350, 300), 4, "random"), {}) < 1e-4


def test_reaches_the_bar_beside_a_base():
    vectors = make_vectors((60, 70), 3, "random")
    base = make_vectors((60, 70), 1, "random", seed=9)[0] * 30
    assert vector_error(tsv_m, reference, vectors, {}, base=base) < 1e-3


def test_by_hand():
    base = torch.zeros(2, 2)
    # the first keeps 3 in the corner, the second 2 * (1, 1)^T (0, 1) / sqrt 2
    models = [torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2**0.5], [0.0, 2**0.5]])]
    # left vectors (1, 0) and (1, 1) / sqrt 2, 45 degrees apart, are turned by 22.5 degrees each; right ones are orthogonal
    turn = torch.tensor(torch.pi / 8, dtype=torch.float64)
    left = torch.stack([torch.stack([turn.cos(), turn.sin()]), torch.stack([-turn.sin(), turn.cos()])])
    expected = (left * torch.tensor([3.0, 2.0])).float()
    found = merge_tensor(tsv_m, base, models)
    torch.testing.assert_close(
        found, torch.stack([expected[0] * torch.tensor([1.0, 1]), expected[1]]), atol=1e-6, rtol=0
    )


def test_one_model_is_that_model():
    for kind in KINDS:
        (vector,) = make_vectors((60, 40), 1, kind)
        torch.testing.assert_close(
            merged_vector(tsv_m, [vector]), vector, rtol=0, atol=1e-5 * float(vector.abs().max())
        )


def test_orthogonal_models_of_low_rank_are_added():
    left, right = rotated(60, seed=1), rotated(40, seed=2)
    cores = make_vectors((5, 5), 4, "random")
    vectors = [left[:, 5 * i : 5 * i + 5] @ core @ right[:, 5 * i : 5 * i + 5].T for i, core in enumerate(cores)]
    added = merged_vector(task_arithmetic, vectors, {"weight": 1.0})
    torch.testing.assert_close(merged_vector(tsv_m, vectors), added, rtol=0, atol=1e-5)


def test_the_norm_is_that_of_all_that_is_kept():
    vectors = make_vectors((60, 40), 4, "random")
    kept = [torch.linalg.svdvals(vector.double())[:10] for vector in vectors]
    expected = torch.cat(kept).square().sum().sqrt()
    torch.testing.assert_close(merged_vector(tsv_m, vectors).double().norm(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 3.0)])
def test_equal_directions_are_not_filled_up(scales):
    # what the values add up to stays in the span of the ten leading triplets
    (vector,) = make_vectors((60, 40), 1, "random")
    u, s, vh = torch.linalg.svd(vector.double())
    truncated = (u[:, :20] * s[:20] @ vh[:20]).float()
    merged = merged_vector(tsv_m, [truncated * scale for scale in scales])
    expected = truncated * sum(scales) / 2
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-3 * float(vector.abs().max()))


def test_a_model_without_changes_does_not_tilt_the_others():
    vectors = make_vectors((60, 40), 3, "low rank")
    zero = torch.zeros(60, 40)
    torch.testing.assert_close(merged_vector(tsv_m, [*vectors, zero, zero]), merged_vector(tsv_m, vectors))


def test_turning_both_sides_turns_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    left, right = rotated(60), rotated(40)
    there = merged_vector(tsv_m, [left @ vector @ right for vector in vectors])
    torch.testing.assert_close(there, left @ merged_vector(tsv_m, vectors) @ right, rtol=0, atol=1e-4)


def test_scaling_the_task_vectors_scales_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    once = merged_vector(tsv_m, vectors)
    assert torch.equal(merged_vector(tsv_m, [vector * 2.0**-40 for vector in vectors]) * 2.0**40, once)
