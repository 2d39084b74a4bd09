"""Inputs in memory: every worker reads into one buffer of its own, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint import Reader, TensorInfo
from .plan import PlannedTensor

_ALIGNMENT = 64


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

    def read(self, tensor: PlannedTensor, start: int, end: int) -> tuple[list[Tensor], int]:
        """Read elements of every input of a tensor; also return the bytes read."""
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
        sources = [tensor.inputs for tensor in tensors]
        runs: list[tuple[TensorInfo, int]] = []
        places: list[list[tuple[int, int]]] = [[] for _ in tensors]
        for k in range(max(map(len, sources))):
            last = None
            for inputs, found in zip(sources, places, strict=True):
                if k >= len(inputs):
                    continue
                source = inputs[k]
                if last is None or not _adjoin(last, source):
                    runs.append((source, 0))
                first, length = runs[-1]
                found.append((len(runs) - 1, length))
                runs[-1] = (first, length + source.nbytes)
                last = source
        starts, nbytes = self._fill([(replace(first, nbytes=length), 0, length) for first, length in runs])
        memory = self._buffer.numpy().data
        values: list[list[Tensor]] = []
        raw: list[list[memoryview]] = []
        for inputs, found in zip(sources, places, strict=True):
            begins = [starts[run] + at for run, at in found]
            raw.append([memory[at : at + source.nbytes] for source, at in zip(inputs, begins, strict=True)])
            values.append([self._typed(source, at, source.nbytes) for source, at in zip(inputs, begins, strict=True)])
        return values, raw, nbytes

    def _fill(self, spans: Sequence[tuple[TensorInfo, int, int]]) -> tuple[list[int], int]:
        """Read byte ranges one behind the other into the buffer; return where each begins, and the bytes read."""
        places, total = [], 0
        for _, _, nbytes in spans:
            places.append(total)
            total += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
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
        and first.file == second.file
        and first.offset + first.nbytes == second.offset
    )
