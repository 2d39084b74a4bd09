"""Collect statistics of a model's activations on text, with one transformer block in memory at a time."""

from .addition import add_statistics
from .run import STATISTICS, calibrate

__all__ = ["STATISTICS", "add_statistics", "calibrate"]
