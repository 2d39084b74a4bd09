import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.ties import ties
from tests.methods.bars import assert_reaches_bars, make_models
from tests.methods.whole_model import merge_whole_model
from tests.reference.ties import ties as reference

WEIGHT = [0.5, 0.3, 0.4]
SETTINGS = [
    {},
    {"density": [0.1, 0.1, 0.1]},
    {"density": [0.2, 0.5, 0.9], "lambda": 0.7},
    {"density": [0.0, 0.5, 1.0]},
    {"density": [0.2, 0.5, 0.9], "normalize": False},
    {"density": [0.2, 0.5, 0.9], "rescale": True},
    {"density": [0.2, 0.5, 0.9], "merge": "max"},
    {"density": [0.2, 0.5, 0.9], "merge": "max", "normalize": False, "lambda": 0.7},
    {"density": [0.2] * 3, "trim_over": "model", "tie": "majority"},
    {"density": [0.2, 0.5, 0.9], "tie": "majority", "rescale": True, "merge": "max"},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(ties, reference, base, models, {"weight": WEIGHT, **parameters})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(ties, reference, base, models, {"weight": WEIGHT, "density": [0.1, 0.5, 0.9]})


def test_by_hand():
    base = torch.zeros(4)
    models = [torch.tensor([4.0, -1.0, 2.0, 0.0]), torch.tensor([2.0, 3.0, -2.0, 0.0])]
    found = merge_tensor(ties, base, models, {"weight": 1})
    # agree; plus wins; a tie elects plus; nothing
    assert found.tolist() == [3, 3, 2, 0]
    found = merge_tensor(ties, base, models, {"weight": [1, 2], "normalize": False, "lambda": 0.5})
    assert found.tolist() == [4, 3, -2, 0]
    found = merge_tensor(ties, base, models, {"weight": 1, "density": [0.5, 0.25]})
    assert found.tolist() == [4, 3, 2, 0]


def test_the_largest_by_hand():
    base = torch.zeros(4)
    models = [torch.tensor([4.0, -1.0, 2.0, 0.0]), torch.tensor([2.0, 3.0, 5.0, 0.0])]
    given = {"merge": "max"}
    for normalize in (True, False):
        found = merge_tensor(ties, base, models, {**given, "weight": 1, "normalize": normalize, "lambda": 2})
        assert found.tolist() == [8, 6, 10, 0]
    # 4 and 6, -1 and 9, 2 and 15
    weight = {"weight": [1, 3]}
    assert merge_tensor(ties, base, models, {**given, **weight, "normalize": False}).tolist() == [6, 9, 15, 0]
    assert merge_tensor(ties, base, models, {**given, **weight}).tolist() == [4, 3, 5, 0]
    # 4 and -6, -1 and -9, 2 and -15
    weight = {"weight": [1, -3], "normalize": False}
    assert merge_tensor(ties, base, models, {**given, **weight}).tolist() == [-6, -9, -15, 0]


def test_a_tie_goes_by_the_majority_of_the_model():
    vectors = [torch.tensor([2.0, -3.0, -1.0, 0.0, 1.0]), torch.tensor([-2.0, -3.0, -1.0, 0.0, 1.0])]
    given = {"weight": 1, "tie": "majority"}

    def merged(*models, **more):
        return merge_tensor(ties, torch.zeros_like(models[0]), list(models), {**given, **more}).tolist()

    assert merged(*vectors) == [-2, -3, -1, 0, 1]
    assert merged(*vectors, tie="plus") == [2, -3, -1, 0, 1]
    assert merged(*(-vector for vector in vectors)) == [2, 3, 1, 0, -1]
    # as many for either: minus
    assert merged(*(vector[[0, 1, 4]] for vector in vectors)) == [-2, -3, 1]
    # trimmed entries vote no more
    assert merged(*vectors, density=0.4) == [-2, -3, 0, 0, 0]
    assert merged(torch.tensor([2.0, 3.0, -1.0, -1.0]), torch.tensor([-2.0, 3.0, -1.0, -1.0])) == [-2, 3, -1, -1]
    kept = merged(torch.tensor([2.0, 3.0, -1.0, -1.0]), torch.tensor([-2.0, 3.0, -1.0, -1.0]), density=0.5)
    assert kept == [2, 3, 0, 0]


def test_the_majority_is_that_of_all_tensors():
    tensors = [
        (torch.zeros(2), [torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 1.0])]),
        (torch.zeros(2, 2), [torch.tensor([[-1.0, -2.0], [-3.0, 1.0]])] * 2),
    ]
    merged = merge_whole_model(ties, tensors, {"weight": 1, "tie": "majority"})
    assert merged[0].tolist() == [-1, 1]
    assert merge_tensor(ties, *tensors[0], {"weight": 1, "tie": "majority"}).tolist() == [1, 1]


def test_entries_as_large_as_the_cut_are_all_kept():
    base, model = torch.zeros(8), torch.tensor([1.0, -2.0, 2.0, 3.0, 2.0, 1.0, 0.5, -2.0])
    found = merge_tensor(ties, base, [model], {"weight": 1, "density": 0.25})
    assert found.tolist() == [0, -2, 2, 3, 2, 0, 0, -2]


def test_one_entry_at_least_is_kept_unless_the_density_is_0():
    base, model = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    assert merge_tensor(ties, base, [model], {"weight": 1, "density": 0.01}).tolist() == [0, -2, 0]
    assert torch.equal(merge_tensor(ties, base, [model], {"weight": 1, "density": 0}), base)


def test_one_untrimmed_model_is_that_model():
    base, (model,) = make_models((80, 125), 1)
    torch.testing.assert_close(merge_tensor(ties, base, [model], {"weight": 1}), model, rtol=0, atol=1e-8)


def test_equal_models_count_as_one():
    base, (model,) = make_models((80, 125), 1)
    alone = merge_tensor(ties, base, [model], {"weight": 1, "density": 0.3})
    together = merge_tensor(ties, base, [model] * 3, {"weight": 0.4, "density": 0.3})
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-8)


def test_turning_the_task_vectors_turns_the_merge():
    base, models = make_models((80, 125), 3)
    there = merge_tensor(ties, torch.zeros_like(base), [model - base for model in models], {"weight": WEIGHT})
    back = merge_tensor(ties, torch.zeros_like(base), [base - model for model in models], {"weight": WEIGHT})
    assert torch.equal(there, -back)


def test_a_full_density_measures_nothing_and_changes_nothing():
    base, models = make_models((80, 125), 3)
    whole = merge_tensor(ties, base, models, {"weight": WEIGHT})
    wanted = {"density": (1.0, 1.0), "rescale": False, "tie": "plus"}
    assert not any(statistic.wanted(wanted) for statistic in ties.statistics.values())
    # one model is trimmed, by nothing
    assert torch.equal(merge_tensor(ties, base, models, {"weight": WEIGHT, "density": [1, 1 - 1e-9, 1]}), whole)


def test_a_trim_over_the_model_is_that_of_one_long_tensor():
    tensors = [make_models((20, 30), 3, seed=1, change=0.01), make_models((500,), 3, seed=2, change=0.1)]
    parameters = {"weight": WEIGHT, "density": [0.1, 0.3, 0.8], "tie": "majority"}
    merged = merge_whole_model(ties, tensors, {**parameters, "trim_over": "model"})
    base = torch.cat([base.reshape(-1) for base, _ in tensors])
    models = [torch.cat([models[i].reshape(-1) for _, models in tensors]) for i in range(3)]
    assert torch.equal(
        torch.cat([result.reshape(-1) for result in merged]), merge_tensor(ties, base, models, parameters)
    )
    # which the tensors are not on their own
    assert not torch.equal(merged[0], merge_tensor(ties, *tensors[0], parameters))


def test_rescaling_restores_the_norm():
    base, (model,) = make_models((80, 125), 1)
    merged = merge_tensor(ties, base, [model], {"weight": 1, "density": 0.2, "rescale": True})
    assert (merged == base).float().mean() > 0.79
    torch.testing.assert_close((merged - base).abs().sum(), (model - base).abs().sum(), rtol=1e-4, atol=0)


def test_a_vote_of_16_bit_weights_is_not_decided_by_rounding():
    # task vectors of few steps: weighted sums that are 0 in decimals are common
    base = torch.zeros(4096, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    models = [(torch.randint(-12, 13, (4096,), generator=generator) * 2.0**-10).bfloat16() for _ in range(3)]
    parameters = {"weight": [0.3, 0.3, 0.3], "normalize": True}
    merged = merge_tensor(ties, base, models, parameters)
    assert torch.equal(merged, reference(base, models, **parameters).bfloat16())


@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_float64_weights_are_merged_in_float64(compute):
    base, models = make_models((80, 125), 3)
    base, models = base.double(), [model.double() + 1e-12 for model in models]
    parameters = {"weight": WEIGHT, "density": [0.2, 0.5, 0.9]}
    merged = merge_tensor(ties, base, models, parameters, compute=compute)
    expected = reference(base, models, **parameters)
    error = float((merged - expected).norm() / expected.norm())
    assert error < (2e-6 if compute == torch.float32 else 1e-15)
