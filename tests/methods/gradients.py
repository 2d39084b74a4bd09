"""Gradients that nothing computed, for methods that use them."""

import torch


def draw(shape, n, *, seed=0, signed=False):
    """Make a tensor for each of n models, float64, whose sizes differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        size = torch.randn(shape, generator=generator, dtype=torch.float64).exp()
        sign = torch.randn(shape, generator=generator, dtype=torch.float64).sign()
        found.append(size**2 * (sign if signed else 1.0))
    return found
