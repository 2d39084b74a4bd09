import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.knots import knots
from merganser.methods.task_arithmetic import task_arithmetic
from merganser.methods.ties import ties
from tests.methods.task_vectors import KINDS, make_vectors, merged_vector, rotated, vector_error
from tests.reference.knots import knots as reference

SETTINGS = [
    {},
    {"density": [0.2, 0.5, 0.9], "weight": [0.5, 1.0, 2.0], "lambda": 0.3},
    {"density": [0.0, 0.5, 1.0], "normalize": False},
    {"density": 0.2, "basis": "input"},
    {"drop": [0.1, 0.5, 0.8]},
    {"drop": [0.0, 0.5, 1.0], "rule": "sum"},
    {"rule": "mean", "weight": [0.5, 1.0, 2.0], "basis": "input"},
    {"rule": "sum", "weight": [0.5, 1.0, 2.0]},
    {"epsilon": 20.0},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 48), (40, 150), (150, 40), (1, 30)])
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_reaches_the_bar(parameters, shape, kind):
    assert vector_error(knots, reference, make_vectors(shape, 3, kind), parameters) < 1e-3


@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bar_with_other_numbers_of_models(n):
    assert vector_error(knots, reference, make_vectors((60, 70), n, "random"), {"density": 0.3}) < 1e-3


def test_reaches_the_bar_on_a_large_matrix():
    assert vector_error(knots, reference, make_vectors((500, 400), 3, "random"), {"density": 0.3}) < 1e-3


def test_by_hand():
    # in the basis (1, 1), (1, -1) the first has 2 and 1, the second 4 and -1/2
    turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    vectors = [turn @ torch.tensor([[2.0], [1.0]]), turn @ torch.tensor([[4.0], [-0.5]])]
    merged = merged_vector(knots, vectors)
    torch.testing.assert_close(merged, turn @ torch.tensor([[3.0], [1.0]]), rtol=0, atol=1e-6)
    # entry by entry they agree
    torch.testing.assert_close(merged_vector(ties, vectors, {"weight": 1.0}), sum(vectors) / 2, rtol=0, atol=1e-6)
    merged = merged_vector(knots, vectors, {"density": 0.5})
    torch.testing.assert_close(merged, turn @ torch.tensor([[3.0], [0.0]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("basis", ["output", "input"])
@pytest.mark.parametrize(("rule", "normalize"), [("sum", False), ("mean", True)])
def test_linear_rules_are_task_arithmetic(rule, normalize, basis):
    vectors = make_vectors((60, 40), 3, "random")
    weight = [0.5, 1.0, 2.0]
    merged = merged_vector(knots, vectors, {"rule": rule, "weight": weight, "basis": basis})
    expected = merged_vector(task_arithmetic, vectors, {"weight": weight, "normalize": normalize})
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_one_model_is_that_model():
    for kind in KINDS:
        (vector,) = make_vectors((60, 40), 1, kind)
        for basis in ("output", "input"):
            merged = merged_vector(knots, [vector], {"basis": basis})
            torch.testing.assert_close(merged, vector, rtol=0, atol=2e-5 * float(vector.abs().max()))


def test_a_basis_of_inputs_is_one_of_outputs_turned_over():
    vectors = make_vectors((60, 40), 3, "random")
    there = merged_vector(knots, vectors, {"density": 0.3, "basis": "input"})
    back = merged_vector(knots, [vector.T.contiguous() for vector in vectors], {"density": 0.3})
    torch.testing.assert_close(there, back.T, rtol=0, atol=1e-5)


def test_turning_the_outputs_turns_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    left = rotated(60)
    there = merged_vector(knots, [left @ vector for vector in vectors], {"density": 0.3})
    expected = left @ merged_vector(knots, vectors, {"density": 0.3})
    assert (there - expected).norm() < 1e-3 * expected.norm()


def test_directions_up_to_epsilon_are_left_out():
    base = torch.zeros(3, 3)
    model = torch.diag(torch.tensor([3.0, 2e-5, 1e-6]))
    assert merge_tensor(knots, base, [model]).diagonal().tolist() == pytest.approx([3, 2e-5, 0], abs=1e-8)
    assert torch.equal(merge_tensor(knots, base, [model], {"epsilon": 4.0}), base)


def test_dropped_coordinates_average_to_what_they_were():
    (vector,) = make_vectors((30, 20), 1, "random")
    merges = [
        merge_tensor(knots, torch.zeros(30, 20), [vector], {"rule": "sum", "drop": 0.5}, seed=seed)
        for seed in range(400)
    ]
    mean = torch.stack(merges).mean(0)
    # in a direction of size s the deviation of one merge is s times an entry of V
    assert (mean - vector).norm() < 5 * vector.norm() / 400**0.5
    assert not torch.equal(merges[0], merges[1])
