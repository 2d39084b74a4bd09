import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.svc import svc
from tests.methods.task_vectors import KINDS, make_vectors, merged_vector, rotated, vector_error
from tests.reference.svc import svc as reference

SETTINGS = [
    {},
    {"alpha": 0.0},
    {"alpha": 1 / 3, "lambda": 1.0},
    {"weight": [0.5, -1.0, 2.0], "alpha": 0.7},
    {"rank_tolerance": 0.1},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 48), (40, 150), (150, 40), (1, 30)])
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_reaches_the_bar(parameters, shape, kind):
    assert vector_error(svc, reference, make_vectors(shape, 3, kind), parameters) < (
        1e-2 if kind == "conditioned" else 1e-3
    )


@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bar_with_other_numbers_of_models(n):
    assert vector_error(svc, reference, make_vectors((60, 70), n, "random"), {}) < 1e-3


def test_reaches_the_bar_on_a_large_matrix():
    assert vector_error(svc, reference, make_vectors((350, 300), 4, "random"), {}) < 1e-3


def test_by_hand():
    base = torch.full((2, 2), 10.0)
    # in the first direction both say 4; the second belongs to the second model
    models = [base + torch.tensor([[4.0, 0.0], [0.0, 0.0]]), base + torch.tensor([[4.0, 0.0], [0.0, 2.0]])]
    # the sum overshoots both by 2; the other direction by 1, and what is missing in the first model counts 0.5
    merged = merge_tensor(svc, base, models, {"lambda": 1.0, "alpha": 0.5})
    torch.testing.assert_close(merged, base + torch.tensor([[4.0, 0.0], [0.0, 2 / 0.75]]))
    # of a tenth of the sum, no direction reaches alpha
    merged = merge_tensor(svc, base, models, {"lambda": 0.1, "alpha": 0.5})
    torch.testing.assert_close(merged, base + torch.tensor([[0.8 / 0.5, 0.0], [0.0, 0.2 / 0.5]]))
    # and without an alpha the missing response counts nothing
    merged = merge_tensor(svc, base, models, {"lambda": 0.1, "alpha": 0.0})
    torch.testing.assert_close(merged, base + torch.tensor([[4.0, 0.0], [0.0, 4.0]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_equal_models_are_that_model(n, kind):
    (vector,) = make_vectors((60, 40), 1, kind)
    found = merged_vector(svc, [vector] * n, {"lambda": 0.6})
    assert float((found - vector).norm() / vector.norm()) < 1e-4


def test_what_is_not_shared_is_not_shrunk():
    vectors = [torch.zeros(40, 50) for _ in range(2)]
    vectors[0][:20, :25], vectors[1][20:, 25:] = make_vectors((20, 25), 2, "random")
    # so that singular vectors are known up to rounding, and responses of nothing are not exactly nothing
    vectors = [rotated(40) @ vector @ rotated(50) for vector in vectors]
    # a response is the own one or none: 1 and alpha
    expected = sum(vectors) * 2 / (1 + 0.1)
    found = merged_vector(svc, vectors, {"lambda": 1.0})
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_what_nobody_asks_for_stays_as_it_is():
    (vector,) = make_vectors((20, 30), 1, "random")
    forgotten = merged_vector(svc, [vector], {"weight": -1.0, "alpha": 0.0})
    torch.testing.assert_close(forgotten, -0.3 * vector, rtol=0, atol=1e-5)


def test_lambda_has_no_effect_where_everything_overshoots():
    vectors = make_vectors((60, 40), 2, "random")
    vectors = [vectors[0] + 0.1 * vectors[1], vectors[0] - 0.1 * vectors[1]]
    once, twice = (merged_vector(svc, vectors, {"lambda": value, "alpha": 0.0}) for value in (0.5, 1.0))
    assert float((twice - once).norm() / once.norm()) < 1e-4


def test_turning_both_sides_turns_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    left, right = rotated(60), rotated(40)
    there = merged_vector(svc, [left @ vector @ right for vector in vectors])
    back = left.T @ there @ right.T
    once = merged_vector(svc, vectors)
    assert float((back - once).norm() / once.norm()) < 1e-3


def test_scaling_the_task_vectors_scales_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    once = merged_vector(svc, vectors)
    assert torch.equal(merged_vector(svc, [vector * 2.0**-40 for vector in vectors]) * 2.0**40, once)


def test_models_that_cancel_give_the_base():
    vector = make_vectors((20, 30), 1, "random")[0]
    assert torch.equal(merge_tensor(svc, torch.zeros(20, 30), [vector, -vector]), torch.zeros(20, 30))
