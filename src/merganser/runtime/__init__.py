"""Merging while a model runs: entries of its key-value cache."""

from __future__ import annotations

from .cache import MergedCache
from .caches import LAYERS

__all__ = ["LAYERS", "MergedCache"]
