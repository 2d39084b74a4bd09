"""The bars of other inputs: recipes that can be merged, and comparisons that see a difference."""

import math

import numpy as np
import pytest
import torch

from benchmarks.inputs import adapters, omp, reading
from merganser.method.registry import get_method_for_adapters
from merganser.recipe import load_recipe
from merganser.transplant.omp import matching_pursuit


@pytest.mark.parametrize("name", adapters.RECIPES)
def test_recipes_of_adapters(name):
    recipe = load_recipe({**adapters.RECIPES[name], "models": [{"model": "a"}, {"model": "b"}]})
    assert get_method_for_adapters(recipe.merge_method).name == recipe.merge_method


def test_the_file_has_half_a_billion_values_in_whole_blocks():
    assert sum(math.prod(shape) for _, shape in reading.shapes()) == 570_818_560
    assert all(width % 256 == 0 for _, (_, width) in reading.shapes())


@pytest.mark.parametrize(("factor", "largest"), [(1.0, 1e-12), (1.001, 1e-3)])
def test_coefficients_are_compared_where_both_chose_the_same(tmp_path, factor, largest):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 16, generator=generator)
    targets = torch.randn(5, 16, generator=generator)
    indices, coefficients = matching_pursuit(targets, rows, 4)
    other = indices.clone()
    # in another order, and of one target other rows
    order = torch.tensor([2, 0, 3, 1])
    other = other[:, order]
    other[4] = torch.arange(50, 54)
    np.save(tmp_path / "indices.npy", other.numpy())
    np.save(tmp_path / "coefficients.npy", coefficients[:, order].numpy() * factor)
    found = omp._compare(rows, targets, indices, coefficients, tmp_path)
    assert (found["same_rows_chosen"], found["well_conditioned"]) == (4, 4)
    assert found["largest_difference"] == pytest.approx(largest, rel=0.02, abs=1e-12)
