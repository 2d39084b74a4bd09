"""Knorm: keys of small norm are attended to most (Devoto et al. 2024)."""

from __future__ import annotations

from ..layer import CompressedLayer

__all__ = ["Knorm"]


class Knorm(CompressedLayer):
    """Keep the entries whose keys have the smallest Euclidean norm.

    Where a model normalises its keys (Qwen3, Gemma 3), their norms differ by the trained weights of that alone.

    Differs from the paper:
        Sinks and window are kept whatever their norm; the paper leaves the first two layers whole.
    """

    def compress(self) -> None:
        """Drop the entries with the longest keys."""
        self.keep(self.best(-self.keys.float().norm(dim=-1)))
