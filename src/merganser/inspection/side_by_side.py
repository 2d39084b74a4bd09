"""Read the same tensors of several checkpoints together, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..anatomy import Anatomy, infer_anatomy
from ..checkpoint import Checkpoint, Reader, TensorInfo
from ..checkpoint.reader import fetched_memory
from ..process import one_thread

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BLOCK", "Blocks", "anatomy_of", "one_thread", "reader_of", "widen", "with_ties"]

BLOCK = 1 << 17
"""Elements that are compared at a time: 1 MB per float64 copy, so that all copies fit into the CPU's cache."""

Bytes = NDArray[np.uint8]


def anatomy_of(checkpoint: Checkpoint) -> Anatomy:
    """Infer layers, roles and tied tensors of a checkpoint."""
    return infer_anatomy({name: tensor.shape for name, tensor in checkpoint.tensors.items()}, checkpoint.config)


def with_ties(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, TensorInfo]:
    """Return all tensors, and tied ones under their names, too: a tied head can be compared with an untied one."""
    ties: Mapping[str, TensorInfo] = {alias: checkpoint.tensors[source] for alias, source in anatomy.tied}
    return {**checkpoint.tensors, **ties}


def reader_of(rows: Iterable[Sequence[TensorInfo]]) -> Reader:
    """Return a reader for blocks of these tensors; tensors of a row are read together.

    Of tensors on the Hub it keeps in memory what was fetched with a block, until the blocks after it are read, too.
    """
    return Reader(fetched=max(map(fetched_memory, rows), default=0))


class Blocks:
    """Reads the same elements of a tensor in several checkpoints, into reused buffers.

    Args:
        reader: Reader for all checkpoints.
        count: Number of checkpoints.
    """

    def __init__(self, reader: Reader, count: int) -> None:
        self._reader = reader
        self._memory = [np.empty(0, dtype=np.uint8)] * count

    def numbers(self, tensors: Sequence[TensorInfo]) -> Iterator[list[Bytes]]:
        """Yield the bytes of each block of elements, one array per checkpoint; the next block overwrites the arrays."""
        yield from self._read(tensors, tensors[0].numel, [tensor.dtype.itemsize for tensor in tensors])

    def bytes(self, tensors: Sequence[TensorInfo]) -> Iterator[list[Bytes]]:
        """Yield blocks of bytes like `numbers`, for tensors of one dtype that are not floats."""
        yield from self._read(tensors, tensors[0].nbytes, [1] * len(tensors))

    def _read(self, tensors: Sequence[TensorInfo], length: int, sizes: Sequence[int]) -> Iterator[list[Bytes]]:
        for start in range(0, length, BLOCK):
            count = min(BLOCK, length - start)
            block = []
            for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
                if len(self._memory[i]) < count * size:
                    self._memory[i] = np.empty(count * size, dtype=np.uint8)
                block.append(self._memory[i][: count * size])
                self._reader.read_into(tensor, start * size, block[-1].data)
            yield block


def widen(data: Bytes, tensor: TensorInfo) -> Tensor:
    """Return the bytes of elements of a float tensor as float64 values."""
    import torch

    return torch.from_numpy(data).view(getattr(torch, tensor.dtype.name)).double()
