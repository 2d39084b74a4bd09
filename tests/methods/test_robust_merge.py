import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.robust_merge import pruned, robust_merge, scales
from tests.methods.task_vectors import KINDS, make_vectors, merged_vector, vector_error
from tests.reference.robust_merge import robust_merge as reference

SETTINGS = [
    {},
    {"rank": 5},
    {"rank": 5, "weight": [0.5, -1.0, 2.0], "lambda": 0.7},
    {"density": 1.0},
    {"density": 0.01},
    {"scale_quantile": 0.0, "rank": 8},
    {"scale_quantile": 1.0, "rank": 8},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 48), (40, 150), (150, 40), (1, 30)])
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_reaches_the_bar(parameters, shape, kind):
    error = vector_error(robust_merge, reference, make_vectors(shape, 3, kind), parameters)
    assert error < (1e-2 if kind in ("conditioned", "shared") else 1e-3)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bar_with_other_numbers_of_models(n):
    assert vector_error(robust_merge, reference, make_vectors((60, 70), n, "low rank"), {}) < 1e-3


def test_reaches_the_bar_on_a_large_matrix():
    assert vector_error(robust_merge, reference, make_vectors((500, 400), 3, "low rank"), {}) < 1e-3


def test_pruning_keeps_what_is_as_large_as_the_kth_smallest():
    factor = torch.tensor([[1.0, -2.0], [3.0, 4.0], [-5.0, 0.5]])
    assert pruned(factor, torch.tensor(0.5)).tolist() == [[0, -2], [3, 4], [-5, 0]]
    assert pruned(factor, torch.tensor(0.2)).tolist() == [[0, 0], [3, 4], [-5, 0]]
    assert torch.equal(pruned(factor, torch.tensor(1.0)), factor)


def test_scales_say_what_pruning_has_taken_and_are_raised():
    before = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 0.0, -3.0, 1.0, 5.0]])
    after = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0], [0.0, 0.0, -3.0, 0.0, 0.0]])
    # 2, 1, 1, 1.25, and all was taken
    assert scales(before, after, torch.tensor(0.0)).tolist() == [2, 1, 1, 1.25, 0]
    assert scales(before, after, torch.tensor(0.5)).tolist() == [2, 1, 1, 1.25, 1]
    assert scales(before, after, torch.tensor(0.8)).tolist() == [2, 2, 2, 2, 2]
    assert scales(before, after, torch.tensor(1.0)).tolist() == [2, 2, 2, 2, 2]


def test_the_weight_of_one_model_counts_twice():
    (vector,) = make_vectors((40, 30), 1, "low rank")
    merged = merged_vector(robust_merge, [vector], {"density": 1.0, "weight": 2.0})
    torch.testing.assert_close(merged, 4 * vector, rtol=0, atol=1e-5 * float(vector.abs().max()))
    merged = merged_vector(robust_merge, [vector], {"density": 1.0})
    torch.testing.assert_close(merged, vector, rtol=0, atol=1e-5 * float(vector.abs().max()))


def test_factors_of_different_models_are_mixed():
    # two models of rank 1, weight 1: (b_1 + b_2) / 2 (a_1 + a_2)
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    vectors = [torch.outer(a, a), torch.outer(b, b)]
    merged = merged_vector(robust_merge, vectors, {"density": 1.0, "weight": 1.0})
    torch.testing.assert_close(merged, torch.full((2, 2), 0.5))


def test_the_rank_is_a_limit():
    (vector,) = make_vectors((40, 30), 1, "random")
    u, s, vh = torch.linalg.svd(vector.double())
    merged = merged_vector(robust_merge, [vector], {"rank": 4, "density": 1.0, "weight": 1.0})
    torch.testing.assert_close(merged.double(), u[:, :4] * s[:4] @ vh[:4], rtol=0, atol=1e-5)


def test_models_of_lower_rank_are_filled_up():
    vectors = make_vectors((40, 30), 3, "low rank")
    vectors[0] = torch.outer(vectors[0][:, 0], vectors[0][0])
    vectors[1] = torch.zeros(40, 30)
    assert vector_error(robust_merge, reference, vectors, {}) < 1e-4


def test_scaling_the_task_vectors_scales_the_merge():
    vectors = make_vectors((40, 30), 3, "low rank")
    once = merged_vector(robust_merge, vectors)
    scaled = merged_vector(robust_merge, [vector * 2.0**-40 for vector in vectors]) * 2.0**40
    torch.testing.assert_close(scaled, once, rtol=0, atol=1e-5 * float(once.abs().max()))


def test_models_without_changes_give_the_base():
    base = make_vectors((20, 30), 1, "random")[0]
    assert torch.equal(merge_tensor(robust_merge, base, [base, base]), base)
