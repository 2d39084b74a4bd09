"""Statistics of models' activations on text, as files: sums over tokens, by the names of a checkpoint's tensors."""

from .choice import Choice, Dataset
from .format import (
    COUNT,
    LOSS,
    LOSSES,
    PREDICTIONS,
    STATISTICS_FORMAT,
    STATISTICS_KIND,
    STATISTICS_NAME,
    Statistics,
    TensorSums,
    check_values,
    open_statistics,
    sum_name,
)
from .plan import CalibrationPlan

__all__ = [
    "COUNT",
    "LOSS",
    "LOSSES",
    "PREDICTIONS",
    "STATISTICS_FORMAT",
    "STATISTICS_KIND",
    "STATISTICS_NAME",
    "CalibrationPlan",
    "Choice",
    "Dataset",
    "Statistics",
    "TensorSums",
    "check_values",
    "open_statistics",
    "sum_name",
]
