"""PLeaS: one matrix, given what it receives. How that is measured is tested in tests/calibration."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import ParameterError
from merganser.methods.pleas import pleas
from tests.methods.spectra import KINDS, SHAPES, make_matrices
from tests.reference.pleas import pleas as reference

EXACT = {"ridge": 1e-13, "limit": 1e9}


def make_inputs(columns, count, *, seed=0, apart=0.3):
    """What the matrix receives in each model: the same up to a part of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4 * columns + 5, columns)
    common = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [common + apart * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def moments(inputs):
    mean = sum(inputs) / len(inputs)
    return [mean.T @ rows / len(rows) for rows in inputs]


def merged(models, inputs, base=None, **parameters):
    return merge_tensor(pleas, base, models, parameters, data={"cross_gram": moments(inputs)})


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(kind, count):
    for shape in SHAPES:
        base, models = make_matrices(shape, count, kind)
        inputs = make_inputs(shape[1], count)
        expected = reference(models, inputs)
        found = merged(models, inputs, **EXACT)
        assert (found - expected).norm() <= 1e-8 * expected.norm()
        assert torch.equal(merged(models, inputs, base, **EXACT), found)


def test_by_hand():
    # inputs 1 and 3, outputs 2 and 12: their means are 2 and 7
    inputs = [torch.tensor([[1.0]]), torch.tensor([[3.0]])]
    found = merged([torch.tensor([[2.0]]), torch.tensor([[4.0]])], inputs, **EXACT)
    torch.testing.assert_close(found, torch.tensor([[3.5]]))


def test_no_other_matrix_is_nearer_to_the_mean_outputs():
    _, models = make_matrices((24, 40), 2, "random")
    inputs = make_inputs(40, 2)
    mean = sum(inputs) / 2
    outputs = sum(rows @ model.T for rows, model in zip(inputs, models, strict=True)) / 2

    def error(matrix):
        return float((mean @ matrix.T - outputs).square().mean())

    found = merged(models, inputs, **EXACT)
    generator = torch.Generator().manual_seed(3)
    nearby = [found + 1e-3 * torch.randn(found.shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    assert error(found) < min(error(other) for other in [sum(models) / 2, *models, *nearby])


def test_equal_inputs_and_equal_models_give_the_average():
    _, models = make_matrices((24, 40), 2, "random")
    same = make_inputs(40, 1) * 2
    torch.testing.assert_close(merged(models, same), sum(models) / 2)
    found = merged([models[0].float()] * 2, make_inputs(40, 2))
    assert torch.equal(found, models[0].float())


def test_ridge_and_limit_pull_towards_the_average():
    _, models = make_matrices((24, 40), 2, "random")
    inputs = make_inputs(40, 2, apart=5.0)
    average = sum(models) / 2
    torch.testing.assert_close(merged(models, inputs, ridge=1e12), average, rtol=0, atol=1e-9)
    apart = (models[0] - average).norm()
    far = merged(models, inputs, **EXACT)
    near = merged(models, inputs, limit=0.01)
    assert (far - average).norm() > 0.01 * apart >= (near - average).norm() > 0


def test_other_tensors_need_a_base_to_be_kept():
    norm = [torch.ones(4), torch.full((4,), 3.0)]
    torch.testing.assert_close(merge_tensor(pleas, None, norm), torch.full((4,), 2.0))
    torch.testing.assert_close(merge_tensor(pleas, None, norm, {"others": "sum"}), torch.full((4,), 4.0))
    with pytest.raises(ParameterError, match="others: 'base' keeps them, and there is no base_model"):
        merge_tensor(pleas, None, norm, {"others": "base"})
    assert torch.equal(merge_tensor(pleas, torch.zeros(4), norm, {"others": "base"}), torch.zeros(4))
