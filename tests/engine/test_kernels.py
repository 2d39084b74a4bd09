import math

import pytest
import torch

from merganser.engine.blocks import merge_tensors
from merganser.errors import NonFiniteError
from merganser.registry import get_method


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("name", "parameters"), [("task_arithmetic", {}), ("ties", {"density": 0.5})])
def test_fused_kernels_notice_what_is_not_finite(name, parameters, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    method = get_method(name)
    inputs = [torch.full((40, 103), 1.0 + i, dtype=torch.float16) for i in range(3)]
    merge_tensors(method, inputs[0], inputs[1:], {"weight": 1, **parameters}, compiled=True)
    for place in range(3):
        for bad in (math.nan, math.inf, -math.inf):
            broken = [tensor.clone() for tensor in inputs]
            broken[place][-1, -1] = bad
            with pytest.raises(NonFiniteError):
                merge_tensors(method, broken[0], broken[1:], {"weight": 1, **parameters}, compiled=True)
    # beyond float16, though all that was read is finite
    with pytest.raises(NonFiniteError):
        merge_tensors(
            method, inputs[0], inputs[1:], {"weight": 40_000, "normalize": False, **parameters}, compiled=True
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_more_than_eight_kernels_in_a_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    method = get_method("task_arithmetic")
    base, model = torch.ones(500), torch.full((500,), 2.0)
    for _ in range(10):
        # each call makes a kernel of its own
        merged = merge_tensors(method, base, [model], {"weight": 0.5}, compiled=True)
        assert torch.equal(merged, torch.full((500,), 1.5))
