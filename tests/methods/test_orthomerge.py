import math

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.orthomerge import orthomerge
from tests.methods.spectra import BARS, KINDS, SHAPES, make_matrices, step_error, steps
from tests.reference.orthomerge import orthomerge as reference

SETTINGS = [{}, {"residual": 0.0}, {"residual": 1.0}]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_reaches_the_bar(parameters, kind, n):
    for shape in SHAPES:
        base, models = make_matrices(shape, n, kind)
        error = step_error(orthomerge, reference, base, models, parameters)
        assert error <= BARS[kind], (shape, error)


def turn(degrees):
    angle = math.radians(degrees)
    return torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64)


def orthogonal(n, seed, size=0.1):
    """Return a rotation, the exponential of a small skew-symmetric matrix."""
    draw = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    return torch.linalg.matrix_exp(draw - draw.T)


def test_by_hand():
    base = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # the tangents of half the angles are averaged
    models = [base @ turn(60), base @ turn(20)]
    half = (math.tan(math.radians(30)) + math.tan(math.radians(10))) / 2
    expected = base @ turn(2 * math.degrees(math.atan(half)))
    torch.testing.assert_close(merge_tensor(orthomerge, base, models), expected)
    # turns that cancel leave the base
    torch.testing.assert_close(merge_tensor(orthomerge, base, [base @ turn(30), base @ turn(-30)]), base)
    # no rotation brings a symmetric positive change nearer
    grown = [base * 1.5, base * 1.1]
    torch.testing.assert_close(merge_tensor(orthomerge, base, grown), base * 1.12)
    torch.testing.assert_close(merge_tensor(orthomerge, base, grown, {"residual": 0.0}), base)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_one_model_with_all_of_its_residual_is_that_model(shape):
    base, (model,) = make_matrices(shape, 1, "random", size=0.02)
    torch.testing.assert_close(merge_tensor(orthomerge, base, [model], {"residual": 1.0}), model)


def test_rotations_keep_the_geometry_of_the_base():
    base, models = make_matrices((24, 40), 3, "random", size=0.01)
    merged = merge_tensor(orthomerge, base, models, {"residual": 0.0})
    assert (merged - base).norm() > 0.05 * base.norm()
    torch.testing.assert_close(merged @ merged.T, base @ base.T)


def test_a_rotated_base_has_no_residual():
    base, _ = make_matrices((60, 24), 1, "random")
    model = base @ orthogonal(24, 1)
    torch.testing.assert_close(merge_tensor(orthomerge, base, [model]), model)
    torch.testing.assert_close(merge_tensor(orthomerge, base, [model] * 3, {"residual": 0.0}), model)


def test_turning_both_sides_turns_the_merge():
    base, models = make_matrices((24, 40), 3, "random", size=0.01)
    left, right = orthogonal(24, 2, size=1.0), orthogonal(40, 3, size=1.0)
    there = steps(orthomerge, left @ base @ right, [left @ model @ right for model in models])
    torch.testing.assert_close(there, left @ steps(orthomerge, base, models) @ right, rtol=1e-7, atol=1e-10)


def test_free_directions_turn_as_little_as_possible():
    # one row, turned by 60 degrees in the plane of the first two inputs
    base = torch.zeros(1, 5, dtype=torch.float64)
    base[0, 0] = 2.0
    model = base.clone()
    model[0, :2] = torch.tensor([1.0, math.sqrt(3)])
    other = base.clone()
    other[0, 0], other[0, 2] = 1.0, math.sqrt(3)
    merged = merge_tensor(orthomerge, base, [model, other], {"residual": 0.0})
    # both tangents are tan(30 degrees), in planes at right angles: the mean turn is by as much, half way between
    expected = torch.tensor([[1.0, math.sqrt(1.5), math.sqrt(1.5), 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(merged, expected)


def test_a_reflection_counts_as_no_rotation():
    base = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    model = base.clone()
    model[2, 2] = -1.0
    torch.testing.assert_close(steps(orthomerge, base, [model]), 0.2 * (model - base), rtol=1e-6, atol=1e-6)


def test_turns_that_cancel_but_for_rounding_leave_the_base():
    base, _ = make_matrices((40, 24), 1, "random")
    there = orthogonal(24, 1)
    moved = steps(orthomerge, base, [base @ there, base @ there.T], {"residual": 0.0})
    assert moved.norm() < 1e-5 * base.norm()


def test_who_did_not_change_halves_the_turn():
    base, (model,) = make_matrices((40, 24), 1, "random", size=0.001)
    alone, both = (steps(orthomerge, base, them, {"residual": 0.0}) for them in ([model], [model, base]))
    torch.testing.assert_close(both, alone / 2, rtol=0, atol=0.02 * float(alone.abs().max()))
    assert torch.equal(merge_tensor(orthomerge, base, [base, base]), base)
