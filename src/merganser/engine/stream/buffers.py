"""Inputs in memory: every worker reuses one buffer of its own.

Inputs that several passes read are cached if they are small enough: reading them again, even from the page cache, takes
as long as the arithmetic.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...checkpoint import Reader, TensorInfo
from ..output.digests import cut_digests, digest, tensor_digest
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
        self._found: dict[int, list[Tensor]] = {}

    def read(self, reader: Reader, start: int, end: int) -> list[Tensor]:
        """Return elements of every input, flat; read the file only the first time."""
        if start in self._found:
            return self._found[start]
        found, place = [], 0
        for source in self._inputs:
            size = source.dtype.itemsize
            data = reader.view(source, start * size, (end - start) * size)
            if data is None:
                data = self.memory[place + start * size : place + end * size]
                reader.read_into(source, start * size, data.numpy().data)
            found.append(data.view(getattr(torch, source.dtype.name)))
            place += aligned(source.nbytes)
        self._found[start] = found
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
    """A buffer that inputs are read into, unless their files are mapped; returned tensors are valid until the next read.

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
        pieces = self._fill(spans)
        found = [_typed(piece, source) for piece, source in zip(pieces, tensor.inputs, strict=True)]
        return found, sum(piece.nbytes for piece in pieces)

    def read_bundle(self, tensors: Sequence[PlannedTensor]) -> BundleInputs:
        """Read all inputs of several tensors; inputs that are adjacent in a file are read with one call."""
        inputs = [tensor.inputs for tensor in tensors]
        runs: list[_Run] = []
        for k in range(max(map(len, inputs))):
            owners = [i for i, own in enumerate(inputs) if k < len(own)]
            runs += _adjacent(owners, [inputs[i][k] for i in owners])
        spans = [(replace(run.sources[0], nbytes=run.nbytes), 0, run.nbytes) for run in runs]
        return BundleInputs([len(own) for own in inputs], runs, self._fill(spans))

    def _fill(self, spans: Sequence[tuple[TensorInfo, int, int]]) -> list[Tensor]:
        """Return byte ranges, uint8: of mapped files as they lie there, of others read into the buffer."""
        pieces = [None if self._pinned else self._reader.view(*span) for span in spans]
        total = sum(aligned(nbytes) for (_, _, nbytes), piece in zip(spans, pieces, strict=True) if piece is None)
        if self._buffer.numel() < total:
            # free the old buffer before the new one is allocated
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=self._pinned)
        found, place = [], 0
        for (source, start, nbytes), piece in zip(spans, pieces, strict=True):
            if piece is None:
                piece = self._buffer[place : place + nbytes]
                self._reader.read_into(source, start, piece.numpy().data)
                place += aligned(nbytes)
            found.append(piece)
        return found


@dataclass(frozen=True, slots=True)
class _Run:
    """Inputs that are adjacent in a file.

    Args:
        owners: The index of the tensor in the bundle that each belongs to.
        sources: The inputs.
    """

    owners: Sequence[int]
    sources: Sequence[TensorInfo]

    @property
    def nbytes(self) -> int:
        """Their bytes together."""
        return sum(source.nbytes for source in self.sources)

    def places(self, start: int = 0) -> list[int]:
        """Return where each begins, and where the last one ends, if the first begins at `start`, bytes."""
        return list(accumulate((source.nbytes for source in self.sources), initial=start))


def _adjacent(owners: Sequence[int], sources: Sequence[TensorInfo]) -> list[_Run]:
    """Divide inputs into runs of adjacent ones; arguments as for `_Run`."""
    whole, first = _Run(owners, sources), sources[0]
    # mostly all are, and this check is faster than comparing neighbours
    alone = any(source.file is not first.file or source.source is not None for source in sources)
    if not alone and whole.places(first.offset)[:-1] == [source.offset for source in sources]:
        return [whole]
    cuts = [i for i in range(1, len(sources)) if not _adjoin(sources[i - 1], sources[i])]
    return [_Run(owners[a:b], sources[a:b]) for a, b in pairwise([0, *cuts, len(sources)])]


class BundleInputs:
    """The inputs of several small tensors; valid until the next read.

    Args:
        counts: The number of inputs of each tensor.
        runs: The inputs, as runs of adjacent ones: first those of the first inputs of all tensors.
        pieces: The bytes of each run, uint8.
    """

    def __init__(self, counts: Sequence[int], runs: Sequence[_Run], pieces: Sequence[Tensor]) -> None:
        self.nbytes = sum(piece.nbytes for piece in pieces)
        self._counts = counts
        self._runs = runs
        self._pieces = pieces

    @cached_property
    def columns(self) -> list[Tensor] | None:
        """The first inputs of all tensors as one flat tensor, the second ones, and so on.

        None unless each of these lies in one piece, in one dtype.
        """
        if {*self._counts} != {len(self._runs)}:
            return None
        found = []
        for run, piece in zip(self._runs, self._pieces, strict=True):
            dtype = run.sources[0].dtype
            if any(source.dtype is not dtype for source in run.sources):
                return None
            found.append(piece.view(getattr(torch, dtype.name)))
        return found

    @cached_property
    def each(self) -> list[list[Tensor]]:
        """The inputs of each tensor, flat."""
        found: list[list[Tensor]] = [[] for _ in self._counts]
        for run, piece in zip(self._runs, self._pieces, strict=True):
            for i, value in zip(run.owners, _parts(run, piece), strict=True):
                found[i].append(value)
        return found

    def digests(self, cuts: Sequence[Sequence[int]]) -> list[bytes]:
        """Hash the inputs of the first tensor, of the second, and so on.

        Args:
            cuts: Where the inputs of each tensor are cut, from `digest_cuts`.
        """
        found: list[list[bytes]] = [[] for _ in self._counts]
        for run, piece in zip(self._runs, self._pieces, strict=True):
            memory = piece.numpy().data
            for i, (first, end) in zip(run.owners, pairwise(run.places()), strict=True):
                data = memory[first:end]
                # most are hashed in one piece
                found[i].append(
                    digest(digest(data)) if len(cuts[i]) <= 2 else tensor_digest(cut_digests(cuts[i], data))
                )
        return list(chain.from_iterable(found))


def _parts(run: _Run, piece: Tensor) -> Sequence[Tensor]:
    """Return views of a run, flat, in their dtypes."""
    sources, dtype = run.sources, run.sources[0].dtype
    if any(source.dtype is not dtype for source in sources):
        parts = [piece[first:end] for first, end in pairwise(run.places())]
        return [_typed(part, source) for part, source in zip(parts, sources, strict=True)]
    return torch.split(piece.view(getattr(torch, dtype.name)), [each.nbytes // dtype.itemsize for each in sources])


def _typed(data: Tensor, source: TensorInfo) -> Tensor:
    """Return bytes as a flat tensor in its input's dtype."""
    if data.data_ptr() % source.dtype.itemsize:
        data = data.clone()
    return data.view(getattr(torch, source.dtype.name))


def _adjoin(first: TensorInfo, second: TensorInfo) -> bool:
    return (
        first.source is None
        and second.source is None
        and (first.file is second.file or first.file == second.file)
        and first.offset + first.nbytes == second.offset
    )
