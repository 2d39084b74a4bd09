"""Find a merge for somebody who names no method: a portfolio, a search around its best, a proof."""

from .choice import Choice
from .run import Interrupted, auto

__all__ = ["Choice", "Interrupted", "auto"]
