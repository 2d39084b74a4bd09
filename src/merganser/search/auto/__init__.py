"""Find a merge for somebody who names no method: a portfolio, a search around its best, a proof."""

from .run import Choice, auto

__all__ = ["Choice", "auto"]
