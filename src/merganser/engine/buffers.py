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
        views, nbytes = self._fill(spans)
        return [_typed(view, source) for view, source in zip(views, tensor.inputs, strict=True)], nbytes

    def read_bundle(self, tensors: Sequence[PlannedTensor]) -> tuple[list[list[Tensor]], int]:
        """Read whole tensors, every input of each; inputs that lie side by side in a file are read at once.

        Returns:
            For each position among the inputs, the tensors in order; and the bytes read.
        """
        width = max(len(tensor.inputs) for tensor in tensors)
        wanted = [[tensor.inputs[k] if k < len(tensor.inputs) else None for tensor in tensors] for k in range(width)]
        spans: list[tuple[TensorInfo, int, int]] = []
        places: list[list[tuple[int, int]]] = []
        for column in wanted:
            found: list[tuple[int, int]] = []
            for source in column:
                if source is None:
                    found.append((-1, 0))
                    continue
                last = spans[-1][0] if found and spans else None
                if last is not None and _adjoin(last, source):
                    run = replace(last, nbytes=last.nbytes + source.nbytes)
                    found.append((len(spans) - 1, last.nbytes))
                    spans[-1] = (run, 0, run.nbytes)
                else:
                    found.append((len(spans), 0))
                    spans.append((source, 0, source.nbytes))
            places.append(found)
        views, nbytes = self._fill(spans)
        empty = torch.empty(0, dtype=torch.uint8)
        columns = [
            [
                empty if source is None else _typed(views[span][at : at + source.nbytes], source)
                for source, (span, at) in zip(column, found, strict=True)
            ]
            for column, found in zip(wanted, places, strict=True)
        ]
        return columns, nbytes

    def _fill(self, spans: Sequence[tuple[TensorInfo, int, int]]) -> tuple[list[Tensor], int]:
        """Read byte ranges one behind the other into the buffer."""
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
        views = [self._buffer[place : place + nbytes] for (_, _, nbytes), place in zip(spans, places, strict=True)]
        return views, sum(nbytes for _, _, nbytes in spans)


def _adjoin(first: TensorInfo, second: TensorInfo) -> bool:
    return (
        first.source is None
        and second.source is None
        and first.file == second.file
        and first.offset + first.nbytes == second.offset
    )


def _typed(data: Tensor, source: TensorInfo) -> Tensor:
    if data.data_ptr() % source.dtype.itemsize:
        data = data.clone()
    return data.view(getattr(torch, source.dtype.name))
