"""Collect statistics of a model's activations on text, with one transformer block in memory at a time."""

from ..statistics import Dataset
from .addition import add_statistics
from .plan import plan_calibration
from .run import STATISTICS, calibrate

__all__ = ["STATISTICS", "Dataset", "add_statistics", "calibrate", "plan_calibration"]
