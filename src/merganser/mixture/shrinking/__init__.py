"""Reduce the number of experts of mixtures of experts."""

from .methods import METHODS
from .run import Shrinking, plan_shrinking, shrink

__all__ = ["METHODS", "Shrinking", "plan_shrinking", "shrink"]
