"""LED-Merging against its reference, and what follows from its definition."""

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.led import led
from tests.methods.gradients import draw
from tests.methods.spectra import make_matrices
from tests.reference.led import led as reference

SETTINGS = [{}, {"rate": [0.1, 0.4, 0.5]}, {"weight": [1.0, -0.5, 2.0], "lambda": 0.7}, {"rate": 1.0}]


def merged(base, models, own, before, **parameters):
    return merge_tensor(led, base, models, parameters, data={"gradient": own, "base_gradient": before})


def case(shape=(9, 14), n=3):
    base, models = make_matrices(shape, n, "random")
    return base, models, draw(shape, n), draw(shape, n, seed=1)


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_agrees_with_the_reference(parameters):
    base, models, own, before = case()
    expected = reference(base, models, own, before, **parameters)
    found = merged(base, models, own, before, **parameters)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert parameters.get("rate") == 1.0 or not torch.equal(found, base)


def test_by_hand():
    base, models = torch.ones(4), [torch.tensor([2.0, 2, 2, 2]), torch.tensor([3.0, 3, 3, 3])]
    own = [torch.tensor([9.0, 8, 1, 1]), torch.tensor([1.0, 8, 9, 0])]
    before = [torch.tensor([9.0, 8, 1, 1]), torch.tensor([1.0, 9, 8, 7])]
    # half of the entries each: 0 and 1, and 1 and 2; both claim 1
    torch.testing.assert_close(merged(base, models, own, before, rate=0.5), torch.tensor([2.0, 1, 3, 1]))


def test_no_entry_belongs_to_two():
    base, models, own, before = case()
    found = merged(base, models, own, before, rate=0.6)
    moved = found != base
    owners = sum(torch.isclose(found, model, rtol=0, atol=1e-12) & moved for model in models)
    assert torch.equal(owners > 0, moved)
    assert 0 < moved.float().mean() < 0.6


def test_scale_of_a_loss_and_rate_0_and_one_model():
    base, models, own, before = case()
    same = merged(base, models, [own[0] * 2.0**9, *own[1:]], before)
    assert torch.equal(same, merged(base, models, own, before))
    assert torch.equal(merged(base, models, own, before, rate=0.0), base)
    alone = merged(base, models[:1], own[:1], before[:1], rate=1.0)
    torch.testing.assert_close(alone, models[0], rtol=1e-12, atol=1e-15)


def test_entries_without_gradient_stay():
    base, models, own, before = case()
    for tensor in own:
        tensor[2:] = 0
    found = merged(base, models, own, before, rate=0.9)
    assert torch.equal(found[2:], base[2:])
    assert not torch.equal(found[:2], base[:2])
    assert torch.equal(merge_tensor(led, base, models), base)
