"""Collect statistics of a model's activations on text, with one transformer block in memory at a time."""

from ..statistics import Dataset
from .planning.plan import plan_calibration
from .single.addition import add_statistics
from .single.run import STATISTICS, calibrate

__all__ = ["STATISTICS", "Dataset", "add_statistics", "calibrate", "plan_calibration"]
