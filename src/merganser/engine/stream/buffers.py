"""Inputs in memory: every worker reuses one buffer of its own.

Inputs that several passes read are cached if they are small enough: reading them again, even from the page cache, takes
as long as the arithmetic.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...checkpoint import Reader, TensorInfo
from ..plan.memory import aligned, kept_bytes

if TYPE_CHECKING:
    from ..plan.tensor import PlannedTensor


class CachedInputs:
    """A cache of one tensor's inputs, filled block by block. Workers share it; two never read the same block at once.

    Args:
        tensor: The tensor.
        memory: Buffer of at least `kept_bytes(tensor)` bytes, uint8.
    """

    def __init__(self, tensor: PlannedTensor, memory: Tensor) -> None:
        self._inputs = tensor.inputs
        self.memory = memory
        self._starts: set[int] = set()

    def read(self, reader: Reader, start: int, end: int) -> list[Tensor]:
        """Return elements of every input, flat; read the file only the first time."""
        found, place = [], 0
        for source in self._inputs:
            size = source.dtype.itemsize
            data = self.memory[place + start * size : place + end * size]
            if start not in self._starts:
                reader.read_into(source, start * size, data.numpy().data)
            found.append(data.view(getattr(torch, source.dtype.name)))
            place += aligned(source.nbytes)
        self._starts.add(start)
        return found


class InputCache:
    """Buffers to cache the inputs of a few tensors at a time; thread-safe.

    Args:
        places: Number of buffers.
        nbytes: Size of each, bytes.
    """

    def __init__(self, places: int, nbytes: int) -> None:
        self._nbytes = nbytes
        self._left = places
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, tensor: PlannedTensor) -> CachedInputs | None:
        """Take a buffer for a tensor's inputs; None if it needs none, does not fit, or all buffers are taken."""
        if not 0 < kept_bytes(tensor) <= self._nbytes:
            return None
        with self._lock:
            if not self._free and self._left:
                self._left -= 1
                self._free.append(torch.empty(self._nbytes, dtype=torch.uint8))
            return CachedInputs(tensor, self._free.pop()) if self._free else None

    def give_back(self, kept: CachedInputs) -> None:
        """Return a buffer, so that another tensor can use it."""
        with self._lock:
            self._free.append(kept.memory)


class InputBuffer:
    """A buffer that inputs are read into; returned tensors are valid until the next read.

    Args:
        reader: Reads the files.
        pinned: Whether to use pinned memory, for copies to a GPU.
    """

    def __init__(self, reader: Reader, *, pinned: bool) -> None:
        self._reader = reader
        self._pinned = pinned
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(
        self, tensor: PlannedTensor, start: int, end: int, kept: CachedInputs | None = None
    ) -> tuple[list[Tensor], int]:
        """Read elements of every input of a tensor, from the cache if there is one; also return the number of bytes."""
        if kept is not None:
            found = kept.read(self._reader, start, end)
            return found, sum(data.nbytes for data in found)
        spans = [
            (source, start * source.dtype.itemsize, (end - start) * source.dtype.itemsize) for source in tensor.inputs
        ]
        places, total = self._fill(spans)
        return [
            self._typed(source, place, nbytes) for (source, _, nbytes), place in zip(spans, places, strict=True)
        ], total

    def read_bundle(self, tensors: Sequence[PlannedTensor]) -> tuple[list[list[Tensor]], list[list[memoryview]], int]:
        """Read all inputs of several tensors; inputs that are adjacent in a file are read with one call.

        Returns:
            For each tensor its inputs, flat; the same inputs as bytes; and the total number of bytes read.
        """
        # runs of adjacent inputs: index of the tensor, and its input
        runs: list[list[tuple[int, TensorInfo]]] = []
        inputs = [tensor.inputs for tensor in tensors]
        for k in range(max(map(len, inputs))):
            last = None
            for i, own in enumerate(inputs):
                if k < len(own):
                    source = own[k]
                    if last is None or not _adjoin(last, source):
                        runs.append([])
                    runs[-1].append((i, source))
                    last = source
        lengths = [sum(source.nbytes for _, source in run) for run in runs]
        spans = [(replace(run[0][1], nbytes=nbytes), 0, nbytes) for run, nbytes in zip(runs, lengths, strict=True)]
        starts, nbytes = self._fill(spans)
        values: list[list[Tensor]] = [[] for _ in tensors]
        raw: list[list[memoryview]] = [[] for _ in tensors]
        memory = self._buffer.numpy().data
        for run, start in zip(runs, starts, strict=True):
            for (i, _), value in zip(run, self._parts([source for _, source in run], start), strict=True):
                values[i].append(value)
            for i, source in run:
                raw[i].append(memory[start : start + source.nbytes])
                start += source.nbytes
        return values, raw, nbytes

    def _parts(self, sources: Sequence[TensorInfo], start: int) -> Sequence[Tensor]:
        """Return views of consecutive tensors in the buffer, flat, in their dtypes."""
        places = list(accumulate((source.nbytes for source in sources), initial=start))
        dtype = sources[0].dtype
        if start % dtype.itemsize or any(source.dtype is not dtype for source in sources):
            return [self._typed(source, at, source.nbytes) for source, at in zip(sources, places[:-1], strict=True)]
        whole = self._buffer[start : places[-1]].view(getattr(torch, dtype.name))
        return torch.split(whole, [source.nbytes // dtype.itemsize for source in sources])

    def _fill(self, spans: Sequence[tuple[TensorInfo, int, int]]) -> tuple[list[int], int]:
        """Read byte ranges into the buffer, one after another; return their starts, and the bytes read."""
        places, total = [], 0
        for _, _, nbytes in spans:
            places.append(total)
            total += aligned(nbytes)
        if self._buffer.numel() < total:
            # free the old buffer before the new one is allocated
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=self._pinned)
        memory = self._buffer.numpy().data
        for (source, start, nbytes), place in zip(spans, places, strict=True):
            self._reader.read_into(source, start, memory[place : place + nbytes])
        return places, sum(nbytes for _, _, nbytes in spans)

    def _typed(self, source: TensorInfo, place: int, nbytes: int) -> Tensor:
        """Return a part of the buffer as a flat tensor in its input's dtype."""
        data = self._buffer[place : place + nbytes]
        if place % source.dtype.itemsize:
            data = data.clone()
        return data.view(getattr(torch, source.dtype.name))


def _adjoin(first: TensorInfo, second: TensorInfo) -> bool:
    return (
        first.source is None
        and second.source is None
        and (first.file is second.file or first.file == second.file)
        and first.offset + first.nbytes == second.offset
    )
