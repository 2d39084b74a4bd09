import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.dare_linear import dare_linear
from merganser.methods.dare_ties import dare_ties
from merganser.methods.ties import ties
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.dare_ties import dare_ties as reference

WEIGHT = [0.5, 0.3, 0.4]
SETTINGS = [
    {"density": [0.1, 0.5, 0.9]},
    {"density": [0.0, 0.5, 1.0], "lambda": 0.7},
    {"density": [0.1, 0.5, 0.9], "normalize": True},
    {"density": [0.1, 0.5, 0.9], "rescale": False},
    {"density": [0.1, 0.5, 0.9], "rescale_to": "l1"},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(dare_ties, reference, base, models, {"weight": WEIGHT, **parameters})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(dare_ties, reference, base, models, {"weight": WEIGHT, "density": [0.1, 0.3, 0.9]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_full_density_is_ties_without_a_trim(dtype, normalize):
    base, models = make_models((80, 125), 3)
    base, models = base.to(dtype), [model.to(dtype) for model in models]
    parameters = {"weight": WEIGHT, "normalize": normalize, "rescale": False}
    plain = merge_tensor(ties, base, models, parameters)
    assert torch.equal(merge_tensor(dare_ties, base, models, parameters), plain)


def test_a_vote_of_16_bit_weights_is_not_decided_by_rounding():
    # task vectors of few steps: weighted sums that are 0 in decimals are common
    base = torch.zeros(20_000, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    models = [(torch.randint(-12, 13, (20_000,), generator=generator) * 2.0**-10).bfloat16() for _ in range(3)]
    parameters = {"weight": WEIGHT, "density": [0.6, 0.3, 0.9]}
    merged = merge_tensor(dare_ties, base, models, parameters)
    assert torch.equal(merged, reference(base, models, **parameters).bfloat16())


def test_one_model_has_no_one_to_disagree_with():
    base, (model,) = make_models((80, 125), 1)
    parameters = {"weight": 0.7, "density": 0.4}
    voted = merge_tensor(dare_ties, base, [model], parameters)
    torch.testing.assert_close(voted, merge_tensor(dare_linear, base, [model], parameters), rtol=0, atol=1e-8)


def test_disagreeing_entries_are_left_out():
    base, models = torch.zeros(10_000), [torch.full((10_000,), 3.0), torch.full((10_000,), -1.0)]
    merged = merge_tensor(dare_ties, base, models, {"weight": 1, "density": 0.5, "rescale": False})
    # nothing, only the second, the first with or without it
    counts = torch.tensor([(merged == value).sum() for value in (0, -1, 3)])
    assert counts.sum() == 10_000
    assert (counts - torch.tensor([2500, 2500, 5000])).abs().max() < 250
