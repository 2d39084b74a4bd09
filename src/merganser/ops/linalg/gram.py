"""Inner products of the inputs, from which SLERP, Karcher, Model Stock and others compute their coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """Return the inner products of a block, shape [T, T], float64.

    Products and sums are computed in float64; the products of float32 values are then exact.
    """
    wide = [tensor.reshape(-1).double() for tensor in tensors]
    n = len(wide)
    upper = {(i, j): (wide[i] * wide[j]).sum() for i in range(n) for j in range(i, n)}
    return torch.stack([upper[min(i, j), max(i, j)] for i in range(n) for j in range(n)]).view(n, n)


def unit_gram(products: Tensor) -> tuple[Tensor, Tensor]:
    """Split inner products into norms and cosines.

    Args:
        products: Inner products, shape [T, T], float64.

    Returns:
        Norms, shape [T], and cosines, shape [T, T], clamped to [-1, 1]; those with a zero tensor are 0.
    """
    norms = products.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(norms, norms)
    cosines = torch.where(scale > 0, products / torch.where(scale > 0, scale, torch.ones_like(scale)), 0.0)
    return norms, cosines.clamp(-1, 1)


def inverse_norms(norms: Tensor) -> Tensor:
    """Return 1 / norm, and 0 where the norm is 0 or too small (up to 1e-30) to divide by it in float32."""
    known = norms > 1e-30
    return torch.where(known, 1 / torch.where(known, norms, torch.ones_like(norms)), 0.0)
