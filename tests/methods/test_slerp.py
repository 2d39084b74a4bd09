import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import CheckpointError
from merganser.methods.slerp import slerp
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.slerp import slerp as reference


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.8, 1.0])
# cosines of about 0.9999 (straight), 0.997, 0.7
@pytest.mark.parametrize("change", [0.01, 0.08, 1.0])
def test_reaches_the_bars(t, change):
    base, models = make_models((80, 125), 1, change=change)
    assert_reaches_bars(slerp, reference, base, models, {"t": t})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 1, change=0.3)
    assert_reaches_bars(slerp, reference, base, models, {"t": 0.35})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [0.01, 1.0])
def test_the_ends_of_the_arc_are_the_inputs_bit_by_bit(dtype, change):
    base, (model,) = make_models((80, 125), 1, change=change)
    base, model = base.to(dtype), model.to(dtype)
    assert torch.equal(merge_tensor(slerp, base, [model], {"t": 0}), base)
    assert torch.equal(merge_tensor(slerp, base, [model], {"t": 1}), model)


@pytest.mark.parametrize("change", [0.01, 1.0])
def test_swapping_the_ends_turns_t_around(change):
    base, (model,) = make_models((80, 125), 1, change=change)
    there = merge_tensor(slerp, base, [model], {"t": 0.3})
    back = merge_tensor(slerp, model, [base], {"t": 0.7})
    torch.testing.assert_close(there, back, rtol=1e-6, atol=1e-8)


def test_keeps_the_norm_of_equally_long_vectors():
    base, (model,) = make_models((80, 125), 1, change=1.0)
    model = model * (base.norm() / model.norm())
    merged = merge_tensor(slerp, base, [model], {"t": 0.5})
    torch.testing.assert_close(merged.norm(), base.norm(), rtol=1e-6, atol=0)
    assert ((base + model) / 2).norm() < 0.95 * base.norm()


def test_right_angles():
    base, model = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    merged = merge_tensor(slerp, base, [model], {"t": 1 / 3})
    torch.testing.assert_close(merged, torch.tensor([3 * 0.75**0.5, 1.5]), rtol=1e-6, atol=0)


def test_opposite_vectors_take_the_straight_line():
    base = torch.tensor([1.0, -2.0, 3.0])
    merged = merge_tensor(slerp, base, [-base], {"t": 0.25})
    torch.testing.assert_close(merged, base / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("which", ["the base", "the model"])
def test_a_tensor_of_zeros_is_refused_unless_an_end_is_taken(which):
    _, (tensor,) = make_models((80, 125), 1)
    base, model = (torch.zeros_like(tensor), tensor) if which == "the base" else (tensor, torch.zeros_like(tensor))
    with pytest.raises(CheckpointError, match=f"^lm.bias: slerp: {which} is all zeros"):
        merge_tensor(slerp, base, [model], {"t": 0.5}, name="lm.bias")
    for t, end in ((0, base), (1, model)):
        assert torch.equal(merge_tensor(slerp, base, [model], {"t": t}), end)
    zero = torch.zeros(5)
    assert torch.equal(merge_tensor(slerp, zero, [zero], {"t": 0.5}), zero)
