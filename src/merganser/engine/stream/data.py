"""Read statistics from data for one matrix at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checkpoint import Reader, TensorInfo
from ..kernels.data import Data, PerModel
from ..kernels.kernels import Kernels
from ..plan.tensor import PlannedTensor, SumFromData


def matrix_data(tensor: PlannedTensor, matrix: int, reader: Reader, kernels: Kernels) -> Data:
    """Return the statistics from data of one of a tensor's matrices: means over tokens, read on access.

    Args:
        tensor: The tensor; it has such statistics.
        matrix: Index of the matrix, if the tensor is a stack of matrices.
        reader: Reads them.
        kernels: Their device and compute dtype are used.
    """

    def mean(own: SumFromData) -> Tensor:
        packed = len(own.count.shape) == 1
        count = reader.tensor(own.count).reshape(-1)[matrix if packed else 0]
        total = _part(reader, own.sum, matrix) if packed else reader.tensor(own.sum)
        # without tokens the sum is 0, so that the mean is 0, too
        return total.to(kernels.device, kernels.compute) / max(int(count), 1)

    return {name: PerModel(len(each), lambda k, each=each: mean(each[k])) for name, each in tensor.data.items()}  # type: ignore[misc]


def _part(reader: Reader, info: TensorInfo, index: int) -> Tensor:
    """Read one entry along the first dimension of a tensor."""
    shape = info.shape[1:]
    nbytes = info.dtype.nbytes(math.prod(shape))
    memory = torch.empty(nbytes, dtype=torch.uint8)
    reader.read_into(info, index * nbytes, memory.numpy().data)
    return memory.view(getattr(torch, info.dtype.name)).view(shape)
