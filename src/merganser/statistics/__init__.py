"""Statistics of models' activations on text, as files: sums over tokens, by the names of a checkpoint's tensors."""

from .format import (
    COUNT,
    LOSS,
    PREDICTIONS,
    STATISTICS_FORMAT,
    STATISTICS_KIND,
    STATISTICS_NAME,
    Statistics,
    TensorSums,
    open_statistics,
    sum_name,
)

__all__ = [
    "COUNT",
    "LOSS",
    "PREDICTIONS",
    "STATISTICS_FORMAT",
    "STATISTICS_KIND",
    "STATISTICS_NAME",
    "Statistics",
    "TensorSums",
    "open_statistics",
    "sum_name",
]
