"""Statistics from data, read for one matrix at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checkpoint import Reader, TensorInfo
from ..kernels.data import Data, PerModel
from ..kernels.kernels import Kernels
from ..plan.tensor import PlannedTensor, SumFromData


def matrix_data(tensor: PlannedTensor, matrix: int, reader: Reader, kernels: Kernels) -> Data:
    """Return the statistics from data of one of a tensor's matrices: means over tokens, read when they are asked for.

    Args:
        tensor: The tensor; it has such statistics.
        matrix: Which of its matrices, where it is a stack of them.
        reader: Reads them.
        kernels: Say on which device and in which dtype.
    """

    def mean(own: SumFromData) -> Tensor:
        packed = len(own.count.shape) == 1
        count = reader.tensor(own.count).reshape(-1)[matrix if packed else 0]
        total = _part(reader, own.sum, matrix) if packed else reader.tensor(own.sum)
        # of no tokens the sum is zero, and so is what stands for the mean
        return total.to(kernels.device, kernels.compute) / max(int(count), 1)

    return {name: PerModel(len(each), lambda k, each=each: mean(each[k])) for name, each in tensor.data.items()}  # type: ignore[misc]


def _part(reader: Reader, info: TensorInfo, index: int) -> Tensor:
    """Read one of the tensors that are stacked in one."""
    shape = info.shape[1:]
    nbytes = info.dtype.nbytes(math.prod(shape))
    memory = torch.empty(nbytes, dtype=torch.uint8)
    reader.read_into(info, index * nbytes, memory.numpy().data)
    return memory.view(getattr(torch, info.dtype.name)).view(shape)
