"""Read statistics from data for one block at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checkpoint import Reader, TensorInfo
from ...statistics import check_values
from ..kernels.blocks import TensorRun
from ..kernels.data import Data, PerModel
from ..plan.tensor import PlannedTensor, SumFromData


def block_data(tensor: PlannedTensor, run: TensorRun, range_: tuple[int, int], reader: Reader) -> Data:
    """Return the statistics from data of a block, or of the matrix that it is: means over tokens, read on access.

    Args:
        tensor: The tensor.
        run: The work on it.
        range_: First element and end of the block.
        reader: Reads them.
    """
    packed = run.kernels.method.scope == "matrix" and len(run.shape) == 3

    def mean(own: SumFromData) -> Tensor:
        if not own.summed:
            found = reader.tensor(own.sum)
            check_values(own.sum, found)
            return found.to(run.kernels.device, run.kernels.compute)
        counts = reader.tensor(own.count).reshape(-1)
        check_values(own.count, counts)
        matrix = run.matrix(range_[0]) if packed else 0
        if own.elementwise:
            total = _part(reader, own.sum, *range_).view(run.own_shape(range_))
            total = total.T if run.turned else total
        elif packed:
            shape = own.sum.shape[1:]
            size = math.prod(shape)
            total = _part(reader, own.sum, matrix * size, (matrix + 1) * size).view(shape)
        else:
            total = reader.tensor(own.sum)
        check_values(own.sum, total)
        # without tokens the sum is 0, so that the mean is 0, too
        count = max(int(counts[matrix if len(counts) > 1 else 0]), 1)
        return total.to(run.kernels.device, run.kernels.compute) / count

    def each(sums: Sequence[SumFromData]) -> PerModel:
        return PerModel(len(sums), lambda k: mean(sums[k]))

    return {name: each(sums) for name, sums in tensor.data.items()}


def _part(reader: Reader, info: TensorInfo, start: int, end: int) -> Tensor:
    """Read some elements of a tensor, flat."""
    memory = torch.empty(info.dtype.nbytes(end - start), dtype=torch.uint8)
    reader.read_into(info, info.dtype.nbytes(start), memory.numpy().data)
    return memory.view(getattr(torch, info.dtype.name))
