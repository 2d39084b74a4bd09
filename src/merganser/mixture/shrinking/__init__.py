"""Make mixtures of experts smaller."""

from .methods import METHODS
from .run import Shrinking, plan_shrinking, shrink

__all__ = ["METHODS", "Shrinking", "plan_shrinking", "shrink"]
