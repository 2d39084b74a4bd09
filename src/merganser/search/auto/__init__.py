"""Find a merge without naming a method: try a portfolio, search around its best, and test the winner."""

from .choice import Choice
from .run import Interrupted, auto

__all__ = ["Choice", "Interrupted", "auto"]
