"""MaTS against its reference, and what follows from its definition."""

from itertools import pairwise

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.mats import mats
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.inputs import make_grams
from tests.methods.spectra import make_matrices
from tests.reference.mats import mats as reference
from tests.reference.mats import system

SETTINGS = [
    {},
    {"alpha": 0.3, "reference": "base"},
    {"iterations": 3, "weight": [1.0, 0.25, 3.0]},
    {"iterations": 15},
]
ROWS, COLUMNS = 8, 12


def case():
    base, models = make_matrices((ROWS, COLUMNS), 3, "random")
    return base, models, make_grams(COLUMNS, 3), make_grams(ROWS, 3, seed=1)


def merged(base, models, inputs, outputs, **parameters):
    return merge_tensor(mats, base, models, parameters, data={"gram": inputs, "gradient_gram": outputs})


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_agrees_with_the_reference(parameters):
    base, models, inputs, outputs = case()
    expected = reference(base, models, inputs, outputs, **parameters)
    found = merged(base, models, inputs, outputs, **parameters)
    assert (found - expected).norm() <= 1e-6 * (expected - base).norm()
    single = merged(
        base.float(),
        [m.float() for m in models],
        [g.float() for g in inputs],
        [h.float() for h in outputs],
        **parameters,
    )
    assert (single.double() - expected).norm() <= 1e-3 * (expected - base).norm()


def test_many_steps_solve_the_equations():
    base, models, inputs, outputs = case()
    matrix, right = system(models, inputs, outputs)
    solution = torch.linalg.solve(matrix, right).view(ROWS, COLUMNS)
    found = merged(base, models, inputs, outputs, iterations=2000)
    average = sum(models) / 3
    residual = (matrix @ found.reshape(-1) - right).norm()
    assert residual <= 2e-5 * (matrix @ average.reshape(-1) - right).norm()
    few = merged(base, models, inputs, outputs, iterations=5)
    # early steps are nearer to where they start
    assert (few - average).norm() < (found - average).norm()
    assert (found - solution).norm() < 0.2 * (average - solution).norm()


def objective(matrix, models, inputs, outputs):
    return sum(
        float((h @ (matrix - m) @ g @ (matrix - m).T).trace()) for m, g, h in zip(models, inputs, outputs, strict=True)
    )


def test_every_step_lowers_the_objective():
    base, models, inputs, outputs = case()
    values = [objective(sum(models) / 3, models, inputs, outputs)]
    values += [
        objective(merged(base, models, inputs, outputs, iterations=n), models, inputs, outputs) for n in range(1, 12)
    ]
    assert all(later < earlier for earlier, later in pairwise(values))


def test_one_model_comes_back_and_equal_grams_give_the_average():
    base, models, inputs, outputs = case()
    torch.testing.assert_close(merged(base, models[:1], inputs[:1], outputs[:1]), models[0], rtol=1e-12, atol=1e-15)
    average = merge_tensor(task_arithmetic, base, models, {"weight": 1.0, "normalize": True})
    found = merged(base, models, inputs[:1] * 3, outputs[:1] * 3)
    torch.testing.assert_close(found, average, rtol=1e-9, atol=1e-12)


def test_without_either_statistic_matrices_are_averaged():
    base, models, inputs, outputs = case()
    average = merge_tensor(task_arithmetic, base, models, {"weight": [1.0, 2.0, 5.0], "normalize": True})
    for data in ({"gram": inputs}, {"gradient_gram": outputs}, {}):
        found = merge_tensor(mats, base, models, {"weight": [1.0, 2.0, 5.0]}, data=data)
        torch.testing.assert_close(found, average, rtol=1e-9, atol=1e-12)
