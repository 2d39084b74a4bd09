"""Compare a method with its float64 reference at the bars that every method must reach."""

import torch

from merganser.engine.kernels.merge_tensor import merge_tensor

FLOAT32 = 2e-6
"""Norm of the error over norm of the reference."""

BFLOAT16 = 1.05
"""Error over the error of rounding the reference once."""


def make_models(shape, n, *, seed=0, change=0.02):
    """Make a base with the scale of trained weights, and fine-tunes that move it by about that share of its norm."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.05
    common = torch.randn(shape, generator=generator)
    models = []
    for _ in range(n):
        own = torch.randn(shape, generator=generator) * (0.5 + torch.rand(shape, generator=generator))
        models.append(base + (0.6 * common + 0.8 * own) * (0.05 * change))
    return base, models


def error(result, expected):
    """Return the norm of the error over the norm of what was expected."""
    return float((result.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def assert_reaches_bars(method, reference, base, models, parameters=None):
    """Assert the float32 and the bfloat16 bar; `base` may be None."""
    parameters = parameters or {}
    merged = merge_tensor(method, base, models, parameters)
    expected = reference(base, models, **parameters)
    assert merged.dtype == torch.float32
    assert error(merged, expected) <= FLOAT32, f"{method.name} in float32, {parameters}"
    base = None if base is None else base.bfloat16()
    models = [model.bfloat16() for model in models]
    merged = merge_tensor(method, base, models, parameters)
    expected = reference(base, models, **parameters)
    assert merged.dtype == torch.bfloat16
    once = error(expected.bfloat16(), expected)
    assert error(merged, expected) <= BFLOAT16 * once, f"{method.name} in bfloat16, {parameters}"
