"""The trim of TIES, which keeps the largest entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sum import deltas


def delta_magnitudes(base: Tensor, models: list[Tensor]) -> list[Tensor]:
    """Return the magnitudes by which task vectors are trimmed: the `values` of a `magnitude_cut`."""
    return [delta.abs() for delta in deltas(base, models)]


def trim(base: Tensor, models: Sequence[Tensor], cut: Tensor | None) -> list[Tensor]:
    """Return the task vectors with their entries below the cut set to 0.

    Args:
        base: The base.
        models: The models.
        cut: From a `magnitude_cut` of `delta_magnitudes`, shape [T, 1], or None to keep all entries.
    """
    vectors = deltas(base, models)
    if cut is None:
        return vectors
    return [torch.where(delta.abs() >= cut[i, 0], delta, torch.zeros_like(delta)) for i, delta in enumerate(vectors)]
