"""Statistics of what a model computes on text, one transformer block at a time."""

from .addition import add_statistics
from .run import STATISTICS, calibrate

__all__ = ["STATISTICS", "add_statistics", "calibrate"]
