"""Coefficients of task vectors among the statistics: written like sums, though they were fitted or learnt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...statistics import COUNT
from ..output.writer import Sum
from .taps import Tapped

__all__ = ["COEFFICIENTS", "coefficient_sums"]

COEFFICIENTS = "coefficients"


def coefficient_sums(name: str, shape: Sequence[int], values: Tensor, count: int) -> Tapped:
    """Return a tensor's coefficients of one model, as they are written.

    Args:
        name: Its name.
        shape: Its shape.
        values: The coefficients, float32.
        count: Number of tokens that they were fitted to.
    """
    sums = {
        COUNT: Sum((), "int64", lambda: torch.tensor(count)),
        COEFFICIENTS: Sum(tuple(values.shape), "float32", lambda: values),
    }
    return Tapped((name,), 0, shape[0], sums)
