"""Inputs in memory: every worker reads into one buffer of its own, again and again.

What is looked at several times, and small enough, is kept in between: reading a file again from the system's cache
costs as much as the arithmetic.
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
    """The inputs of one tensor, block by block as they were first read. Workers share it: no two read one block at a time.

    Args:
        tensor: The tensor.
        memory: Room for `kept_bytes(tensor)`.
    """

    def __init__(self, tensor: PlannedTensor, memory: Tensor) -> None:
        self._inputs = tensor.inputs
        self.memory = memory
        self._starts: set[int] = set()

    def read(self, reader: Reader, start: int, end: int) -> list[Tensor]:
        """Return elements of every input, from memory if they were read before."""
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
    """Memory for a few tensors at a time whose inputs are kept; thread-safe.

    Args:
        places: Number of tensors.
        nbytes: Room for each, bytes.
    """

    def __init__(self, places: int, nbytes: int) -> None:
        self._nbytes = nbytes
        self._left = places
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, tensor: PlannedTensor) -> CachedInputs | None:
        """Take a place for the inputs of a tensor; None where it does not need one, does not fit, or all are taken."""
        if not 0 < kept_bytes(tensor) <= self._nbytes:
            return None
        with self._lock:
            if not self._free and self._left:
                self._left -= 1
                self._free.append(torch.empty(self._nbytes, dtype=torch.uint8))
            return CachedInputs(tensor, self._free.pop()) if self._free else None

    def give_back(self, kept: CachedInputs) -> None:
        """Let another tensor have the place."""
        with self._lock:
            self._free.append(kept.memory)


class InputBuffer:
    """Memory that inputs are read into; what it returns is valid until the next read.

    Args:
        reader: Reads the files.
        pinned: Whether the memory is to be copied to a GPU.
    """

    def __init__(self, reader: Reader, *, pinned: bool) -> None:
        self._reader = reader
        self._pinned = pinned
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(
        self, tensor: PlannedTensor, start: int, end: int, kept: CachedInputs | None = None
    ) -> tuple[list[Tensor], int]:
        """Read elements of every input of a tensor, or take them from what is kept; also return their bytes."""
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
        """Read whole tensors, every input of each; inputs that lie side by side in a file are read at once.

        Returns:
            For each tensor its inputs, flat; the same as bytes; and the number of bytes.
        """
        # which tensor, and its input
        runs: list[list[tuple[int, TensorInfo]]] = []
        for k in range(max(len(tensor.inputs) for tensor in tensors)):
            last = None
            for i, tensor in enumerate(tensors):
                if k < len(tensor.inputs):
                    source = tensor.inputs[k]
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
        """Return tensors that were read one behind the other, flat, in their dtypes."""
        places = list(accumulate((source.nbytes for source in sources), initial=start))
        dtype = sources[0].dtype
        if start % dtype.itemsize or any(source.dtype is not dtype for source in sources):
            return [self._typed(source, at, source.nbytes) for source, at in zip(sources, places[:-1], strict=True)]
        whole = self._buffer[start : places[-1]].view(getattr(torch, dtype.name))
        return torch.split(whole, [source.nbytes // dtype.itemsize for source in sources])

    def _fill(self, spans: Sequence[tuple[TensorInfo, int, int]]) -> tuple[list[int], int]:
        """Read byte ranges one behind the other into the buffer; return where each begins, and the bytes read."""
        places, total = [], 0
        for _, _, nbytes in spans:
            places.append(total)
            total += aligned(nbytes)
        if self._buffer.numel() < total:
            # the old one goes first
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=self._pinned)
        memory = self._buffer.numpy().data
        for (source, start, nbytes), place in zip(spans, places, strict=True):
            self._reader.read_into(source, start, memory[place : place + nbytes])
        return places, sum(nbytes for _, _, nbytes in spans)

    def _typed(self, source: TensorInfo, place: int, nbytes: int) -> Tensor:
        """Return a part of the buffer in the dtype of what was read there."""
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
