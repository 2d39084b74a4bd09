"""What a calibration will do, before it runs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CalibrationPlan"]


@dataclass(frozen=True)
class CalibrationPlan:
    """A calibration, planned from file headers and the tokens of the data.

    Args:
        model: The model's name in the recipe, or as it was given.
        name: Name of the folder of its statistics.
        data: Names of the data files, or of the data set.
        statistics: What is summed, `count` first.
        sequences: Number of sequences that were drawn.
        tokens: Number of tokens that the model reads.
        counted: Number of tokens that the statistics include.
        bytes_read: Bytes of the model's files that are read: all once for their hash, those of the blocks twice more,
            for a check with a few tokens and for the calibration itself, and for gradients all once more and those of
            the blocks again; a second reading mostly comes from memory.
        forward_operations: Floating-point operations of the model on these tokens, with its reverse pass if there is one.
        sum_operations: Floating-point operations of the sums.
        seconds: Time to expect: these operations at the rate of a short measurement on this machine, and the reading at
            1 GB/s.
        peak_memory: Largest resident memory to expect, bytes.
        spool_bytes: Disk space for hidden states while it runs, bytes.
        statistics_bytes: Size of the statistics, bytes.
        files: Names of the files in that folder.
        steps: Number of steps in which coefficients are learnt by gradients of the whole merged model; 0 if none are.
        present: Whether the statistics are there already, and nothing is done.
    """

    model: str
    name: str
    data: tuple[str, ...]
    statistics: tuple[str, ...]
    sequences: int
    tokens: int
    counted: int
    bytes_read: int
    forward_operations: float
    sum_operations: float
    seconds: float
    peak_memory: int
    spool_bytes: int
    statistics_bytes: int
    files: tuple[str, ...]
    steps: int = 0
    present: bool = False
