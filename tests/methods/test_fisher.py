"""Fisher merging against its reference, and what follows from its definition."""

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.fisher import fisher
from tests.methods.gradients import draw
from tests.methods.spectra import make_matrices
from tests.reference.fisher import fisher as reference

SETTINGS = [{}, {"normalize": False}, {"floor": 1.0}, {"weight": [1.0, 0.25, 3.0]}]


def merged(models, data, **parameters):
    return merge_tensor(fisher, None, models, parameters, data={"fisher": data})


def case(shape=(6, 10)):
    _, models = make_matrices(shape, 3, "random")
    # models that are unsure have larger gradients everywhere
    return models, [own * size for own, size in zip(draw(shape, 3), (1e-9, 1e-7, 1e-8), strict=True)]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_agrees_with_the_reference(parameters):
    models, data = case()
    (expected,) = reference([[m] for m in models], [[d] for d in data], **parameters)
    torch.testing.assert_close(merged(models, data, **parameters), expected, rtol=1e-12, atol=1e-15)
    single = merged([m.float() for m in models], [d.float() for d in data], **parameters)
    torch.testing.assert_close(single.double(), expected, rtol=2e-6, atol=1e-8)


def test_by_hand():
    models = [torch.tensor([0.0, 4.0]), torch.tensor([4.0, 0.0])]
    data = [torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])]
    torch.testing.assert_close(merged(models, data), torch.tensor([1.0, 1.0]))


def test_equal_fishers_give_the_average():
    models, (own, *_) = case()
    torch.testing.assert_close(merged(models, [own] * 3), sum(models) / 3, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(merged(models[:1], [own]), models[0], rtol=1e-12, atol=0)


def test_the_result_lies_between_the_models():
    models, data = case()
    found, every = merged(models, data), torch.stack(models)
    assert (found <= every.max(0).values + 1e-15).all()
    assert (found >= every.min(0).values - 1e-15).all()


def test_a_common_factor_changes_nothing_and_one_of_a_model_only_without_normalising():
    models, data = case()
    for normalize in (True, False):
        scaled = merged(models, [own * 2.0**-20 for own in data], normalize=normalize)
        assert torch.equal(scaled, merged(models, data, normalize=normalize))
    other = [data[0] * 2.0**10, *data[1:]]
    torch.testing.assert_close(merged(models, other), merged(models, data), rtol=1e-12, atol=1e-15)
    apart = merged(models, other, normalize=False) - merged(models, data, normalize=False)
    assert apart.abs().max() > 1e-5


def test_where_no_model_has_gradients_the_average_remains():
    models, data = case()
    for own in data:
        own[:, 3] = 0
    found = merged(models, data, weight=[1.0, 2.0, 1.0])
    expected = (models[0] + 2 * models[1] + models[2])[:, 3] / 4
    torch.testing.assert_close(found[:, 3], expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(merge_tensor(fisher, None, models, {"weight": [0.0, 1.0, 0.0]}), models[1])


def test_tiny_fishers_are_no_zeros():
    """In float32 their squares are."""
    models, data = case()
    tiny = [own.float() * 1e-12 for own in data]
    single = merged([m.float() for m in models], tiny)
    torch.testing.assert_close(single.double(), merged(models, data), rtol=1e-5, atol=1e-8)
