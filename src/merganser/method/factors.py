"""Low-rank factors, as methods of scope "factors" get and return them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Factors"]


class Factors(NamedTuple):
    """The change of one weight matrix, scale * B A.

    Args:
        a: A, shape [r, inputs], float32.
        b: B, shape [outputs, r], float32.
        scale: The scale of the adapter, alpha / r or alpha / sqrt(r); what a method returns has the scale 1.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def product(self) -> Tensor:
        """The change itself, shape [outputs, inputs]."""
        return self.b @ self.a * self.scale
