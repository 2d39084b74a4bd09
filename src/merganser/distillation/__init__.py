"""Teach one model what others say: what a source predicts on text is stored once, so that it need not run again."""

from .cache import cache_logits
from .format import LogitCache, open_cache

__all__ = ["LogitCache", "cache_logits", "open_cache"]
