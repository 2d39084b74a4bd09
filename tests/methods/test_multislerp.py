import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.multislerp import multislerp
from merganser.methods.nuslerp import nuslerp
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.multislerp import multislerp as reference


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    "parameters",
    [
        {"weight": [1.0, 1.0, 1.0]},
        {"weight": [0.2, 0.5, 1.7]},
        {"weight": [1.5, -0.3, 0.1]},
        {"weight": [0.2, 0.5, 0.1], "normalize_weights": False},
    ],
)
def test_reaches_the_bars(with_base, parameters):
    base, models = make_models((80, 125), 3, change=0.3)
    # of different lengths
    models[1] = base + 3 * (models[1] - base)
    assert_reaches_bars(multislerp, reference, base if with_base else None, models, parameters)


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 4)
    assert_reaches_bars(multislerp, reference, base, models, {"weight": [0.4, 0.3, 0.2, 0.7]})


def test_has_the_weighted_mean_of_the_lengths():
    _, models = make_models((80, 125), 3, change=2.0)
    merged = merge_tensor(multislerp, None, models, {"weight": [1, 2, 5]})
    lengths = torch.stack([model.norm() for model in models])
    torch.testing.assert_close(merged.norm(), lengths @ torch.tensor([1 / 8, 2 / 8, 5 / 8]), rtol=1e-5, atol=0)


def test_half_way_between_two_of_one_length_it_is_slerp():
    _, models = make_models((80, 125), 2)
    models[1] = models[1] * (models[0].norm() / models[1].norm())
    merged = merge_tensor(multislerp, None, models, {"weight": [1, 1]})
    torch.testing.assert_close(merged, merge_tensor(nuslerp, None, models, {"weight": [1, 1]}), rtol=1e-5, atol=1e-7)


def test_one_model_is_returned_as_it_is():
    base, models = make_models((80, 125), 1)
    for start in (base, None):
        merged = merge_tensor(multislerp, start, models, {"weight": [0.3], "normalize_weights": False})
        assert torch.equal(merged, models[0])


@pytest.mark.parametrize("n", [2, 3])
def test_directions_that_cancel_are_averaged_as_they_are(n):
    """Two opposite vectors, or three at 120 degrees."""
    angles = torch.arange(n) * (2 * torch.pi / n)
    units = torch.stack([angles.cos(), angles.sin()], dim=1)
    models = list(units * torch.tensor([[3.0], [1.0], [1.0]])[:n])
    merged = merge_tensor(multislerp, None, models, {"weight": [1.0] * n}, compute=torch.float64)
    torch.testing.assert_close(merged, torch.tensor([2.0 / n, 0.0]), rtol=1e-6, atol=1e-6)


def test_a_task_vector_of_zeros_has_no_direction_but_counts_in_the_length():
    base, (model,) = make_models((80, 125), 1, change=0.5)
    merged = merge_tensor(multislerp, base, [base, model], {"weight": [1, 1]})
    torch.testing.assert_close(merged - base, (model - base) / 2, rtol=1e-4, atol=1e-6)
    assert torch.equal(merge_tensor(multislerp, base, [base, base], {"weight": [1, 1]}), base)


def test_a_model_of_zeros_has_no_direction_but_counts_in_the_length():
    _, models = make_models((80, 125), 1)
    merged = merge_tensor(multislerp, None, [models[0], torch.zeros_like(models[0])], {"weight": [1, 1]})
    torch.testing.assert_close(merged, models[0] / 2, rtol=1e-6, atol=0)
