import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.r_tsvm import outlier_mass, r_tsvm
from merganser.methods.tsv_m import tsv_m
from tests.methods.task_vectors import KINDS, make_vectors, merged_vector, vector_error
from tests.reference.r_tsvm import r_tsvm as reference

SETTINGS = [{}, {"weight": [0.5, -1.0, 2.0], "lambda": 0.7}, {"sigmas": 1.0, "epsilon": 0.5}, {"sigmas": 100.0}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 48), (40, 150), (150, 40), (1, 30)])
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_reaches_the_bar(parameters, shape, kind):
    assert vector_error(r_tsvm, reference, make_vectors(shape, 3, kind), parameters) < 1e-3


@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bar_with_other_numbers_of_models(n):
    assert vector_error(r_tsvm, reference, make_vectors((60, 70), n, "random"), {}) < 1e-4


def test_a_sparser_model_gets_a_lower_rank():
    dense, sparse = make_vectors((40, 40), 2, "random")
    sparse[torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) < 0.75] = 0
    assert vector_error(r_tsvm, reference, [dense, sparse], {}) < 1e-4
    share = float((sparse != 0).sum()) / sparse.numel()
    alone = merged_vector(r_tsvm, [sparse, dense], {"weight": [1.0, 0.0]})
    assert (torch.linalg.svdvals(alone.double()) > 1e-4).sum() == int(40 * share / (1 + share)) == 7


def test_outliers_are_above_the_mean_by_deviations():
    delta = torch.tensor([[1.0, -1.0, 1.0, -9.0]])
    # mean 3, deviation sqrt(12)
    assert outlier_mass(delta, torch.tensor(1.7)).item() == 9
    assert outlier_mass(delta, torch.tensor(1.8)).item() == 0


def test_models_alike_are_merged_as_by_tsv_m():
    (vector,) = make_vectors((40, 50), 1, "random")
    # the same entries in other places
    vectors = [vector, vector.flip(0), vector.flip(1)]
    torch.testing.assert_close(merged_vector(r_tsvm, vectors), merged_vector(tsv_m, vectors), rtol=0, atol=1e-5)


def test_without_outliers_the_weights_are_equal():
    vectors = [vector.sign() for vector in make_vectors((40, 50), 3, "random")]
    torch.testing.assert_close(merged_vector(r_tsvm, vectors), merged_vector(tsv_m, vectors), rtol=0, atol=1e-5)


def test_models_without_changes_give_the_base():
    base = make_vectors((20, 30), 1, "random")[0]
    assert torch.equal(merge_tensor(r_tsvm, base, [base, base]), base)
