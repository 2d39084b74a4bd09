import math

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.magic import magic
from tests.methods.bars import assert_reaches_bars, make_models
from tests.methods.task_vectors import KINDS, make_vectors, merged_vector, vector_error
from tests.reference.magic import magic as reference

SETTINGS = [{}, {"lambda": 0.3}, {"weight": [0.5, -1.0, 2.0]}, {"weight": 0.25}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 48), (40, 150), (150, 40), (1, 30), (30, 1)])
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_task_vectors_are_those_of_the_reference(parameters, shape, kind):
    assert vector_error(magic, reference, make_vectors(shape, 3, kind), parameters) < 2e-5


@pytest.mark.parametrize("n", [1, 2, 3, 16])
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(n, change):
    base, models = make_models((80, 125), n, change=change)
    assert_reaches_bars(magic, reference, base, models, {"lambda": 0.9})


def test_by_hand():
    base = torch.full((4, 3), 10.0)
    first = torch.tensor([[4.0, 0.0, 0.0], [3.0, 4.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    second = torch.tensor([[0.0, 2.0, 0.0], [3.0, 4.0, 0.0], [-5.0, 0.0, 0.0], [0.0, 7.0, 0.0]])
    found = merge_tensor(magic, base, [base + first, base + second]) - base
    # row 0, orthogonal: c = 1, 1. Row 1, equal: c = 2, 2 and rest = -2 a. Row 2, opposite: d = 0. Row 3: c = 0, 1
    gain = torch.tensor([[1 / math.sqrt(2)], [1 / math.sqrt(4 + 4 + 4)], [1.0], [1.0]])
    torch.testing.assert_close(found, gain * (first + second))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1.0, -1.0, 0.1])
def test_one_model_is_itself_whatever_its_weight(weight, kind):
    (vector,) = make_vectors((60, 40), 1, kind)
    found = merged_vector(magic, [vector], {"weight": weight})
    assert float((found - math.copysign(1, weight) * vector).norm() / vector.norm()) < 1e-6


def test_only_ratios_of_weights_count():
    vectors = make_vectors((60, 40), 3, "random")
    once = merged_vector(magic, vectors, {"weight": [1.0, 2.0, 4.0]})
    torch.testing.assert_close(merged_vector(magic, vectors, {"weight": [0.1, 0.2, 0.4]}), once)


def test_orthogonal_rows_come_to_one_over_the_root_of_their_number():
    vectors = [torch.zeros(5, 8) for _ in range(4)]
    for i, vector in enumerate(vectors):
        vector[:, 2 * i] = 10.0**i
    expected = sum(vectors) / 2
    torch.testing.assert_close(merged_vector(magic, vectors), expected)


def test_rows_are_calibrated_each_by_itself():
    vectors = make_vectors((20, 30), 2, "random")
    whole = merged_vector(magic, vectors)
    for row in range(20):
        alone = merged_vector(magic, [vector[row : row + 1] for vector in vectors])
        torch.testing.assert_close(alone[0], whole[row])


def test_scaling_the_task_vectors_scales_the_merge():
    vectors = make_vectors((60, 40), 3, "random")
    once = merged_vector(magic, vectors)
    tiny = merged_vector(magic, [vector * 2.0**-60 for vector in vectors])
    assert torch.equal(tiny * 2.0**60, once)
