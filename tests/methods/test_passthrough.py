import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.passthrough import passthrough
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.passthrough import passthrough as reference


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, -1.7])
def test_reaches_the_bars(scale):
    _, models = make_models((80, 125), 1)
    assert_reaches_bars(passthrough, reference, None, models, {"scale": [scale]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_copies_bit_by_bit(dtype):
    _, (model,) = make_models((80, 125), 1)
    model = model.to(dtype)
    # signed zeros, the smallest denormal numbers, the largest numbers
    limits = torch.finfo(dtype)
    model[0, :6] = torch.tensor(
        [0.0, -0.0, limits.smallest_normal / 4, -limits.smallest_normal / 4, limits.max, limits.min], dtype=dtype
    )
    copy = merge_tensor(passthrough, None, [model])
    assert torch.equal(copy.view(torch.uint8), model.view(torch.uint8))


def test_takes_one_model():
    _, models = make_models((4,), 2)
    with pytest.raises(ValueError, match="exactly 1 model, got 2"):
        merge_tensor(passthrough, None, models)
