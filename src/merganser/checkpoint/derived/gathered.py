"""Tensors whose rows are rows of other tensors, or weighted sums of them, computed while they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..dtypes import DTYPE_BY_NAME, DType
from ..tensor import ByteReader, TensorInfo, matched
from .derived import read_elements

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MadeRows", "RowMap", "gathered", "pick_rows", "with_rows_of"]

Rows = npt.NDArray[np.int64]

_SLAB = 1 << 19
"""Elements computed at a time: the size of the engine's blocks."""

_SPAN = 4 << 20
"""Bytes read with one call, at most."""

_GAP = 1 << 15
"""Bytes; rows that lie closer are read with one call, together with what lies between them."""

_LONG = 256
"""A made row of more terms than this is kept once computed, as several rows of an output often share it."""


@dataclass(frozen=True, eq=False)
class MadeRows:
    """Rows that are weighted sums of stored rows, in the layout of a sparse matrix of compressed rows.

    Attributes:
        starts: First term of each made row, and the number of all terms; shape [made + 1].
        source: For each term, the index of its tensor; shape [terms].
        row: For each term, the row of that tensor; shape [terms].
        weight: For each term, its weight, float64; shape [terms]. A made row without terms is zero.
    """

    starts: Rows
    source: Rows
    row: Rows
    weight: npt.NDArray[np.float64]

    @classmethod
    def of(cls, terms: Sequence[Sequence[tuple[int, int, float]]]) -> MadeRows:
        """Build the rows from lists of (tensor, row, weight)."""
        flat = [term for each in terms for term in each]
        starts = np.cumsum([0, *(len(each) for each in terms)], dtype=np.int64)
        source, row, weight = zip(*flat, strict=True) if flat else ((), (), ())
        return cls(starts, np.array(source, np.int64), np.array(row, np.int64), np.array(weight, np.float64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def copies(self) -> bool:
        """Whether every made row is a copy of one row, or zero."""
        counts = np.diff(self.starts)
        return bool((counts <= 1).all() and (self.weight == 1.0).all())


@dataclass(frozen=True, eq=False)
class RowMap:
    """Which row of a tensor each row of a gathered one is.

    Attributes:
        index: For each row, the row of the first tensor; or -1 - k for the k-th made row; shape [rows].
        made: The made rows.
    """

    index: Rows
    made: MadeRows

    @property
    def identity(self) -> bool:
        """Whether row i is row i of the first tensor."""
        return bool((self.index == np.arange(len(self.index))).all())


def gathered(tensors: Sequence[TensorInfo], rows: RowMap, *, name: str | None = None) -> TensorInfo:
    """Return a tensor whose rows are gathered from others when they are read.

    Copies keep their bytes. If a row is a sum, or comes from a tensor of another dtype, all values are read as float32
    (float64 if one of the tensors is), so that nothing is rounded before the merge.

    Args:
        tensors: The tensors; they have equal shapes but for the number of rows. The first one gives name and file.
        rows: Which rows to take; the tensors of made rows are numbered as in `tensors`.
        name: Another name than the first tensor's.
    """
    own = tensors[0]
    alike = all(tensor.dtype == own.dtype for tensor in tensors)
    wide = "float64" if any(tensor.dtype.name == "float64" for tensor in tensors) else "float32"
    dtype = own.dtype if alike and rows.made.copies else DTYPE_BY_NAME[wide]
    shape = (len(rows.index), *own.shape[1:])
    return replace(
        own if name is None else matched(own, name),
        dtype=dtype,
        shape=shape,
        offset=-1,
        nbytes=dtype.nbytes(math.prod(shape)),
        source=_Gathered(tuple(tensors), rows, dtype),
        stored=own.stored or (own,),
        natural=own.natural or own.dtype,
    )


def with_rows_of(gathered_one: TensorInfo, other: TensorInfo) -> TensorInfo:
    """Return a tensor with its rows in the places that `gathered` gave those of another one.

    Args:
        gathered_one: A tensor; one that was not gathered leaves `other` as it is.
        other: A tensor with as many rows as the first tensor that the former was gathered from; it is left as it is if it
            has other rows. Rows that were made of others are zero.
    """
    source = gathered_one.source
    if not isinstance(source, _Gathered) or other.shape[:1] != source.tensors[0].shape[:1]:
        return other
    index = source.rows.index.copy()
    index[index < 0] = -1
    return gathered([other], RowMap(index, MadeRows.of([[]])))


@dataclass(frozen=True, eq=False)
class _Gathered:
    """The source of a gathered tensor."""

    tensors: tuple[TensorInfo, ...]
    rows: RowMap
    dtype: DType
    kept: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle without the rows that were kept."""
        return _Gathered, (self.tensors, self.rows, self.dtype)

    @property
    def width(self) -> int:
        return math.prod(self.tensors[0].shape[1:])

    def read_into(self, reader: ByteReader, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of the tensor, beginning at byte `start`."""
        import torch

        row = self.width * self.dtype.itemsize
        found = torch.frombuffer(buffer, dtype=torch.uint8)
        step = max(1, _SLAB // self.width)
        at, end = start, start + len(buffer)
        while at < end:
            first = at // row
            last = min(first + step, -(-end // row))
            values = self._values(reader, first, last).reshape(-1).view(torch.uint8)
            skip, upto = at - first * row, min(last * row, end)
            found[at - start : upto - start] = values[skip : skip + upto - at]
            at = upto

    def _values(self, reader: ByteReader, first: int, last: int) -> Tensor:
        """Return rows in the tensor's dtype, shape [last - first, width]."""
        import torch

        index = self.rows.index[first:last]
        values = torch.empty(len(index), self.width, dtype=getattr(torch, self.dtype.name))
        own = index >= 0
        if own.any():
            values[torch.from_numpy(own)] = pick_rows(reader, self.tensors[0], index[own], self.width).to(values.dtype)
        if not own.all():
            wanted, place = np.unique(-1 - index[~own], return_inverse=True)
            made = self._copied(reader, wanted) if self.rows.made.copies else self._summed(reader, wanted)
            values[torch.from_numpy(~own)] = made.to(values.dtype)[torch.from_numpy(place)]
        return values

    def _copied(self, reader: ByteReader, wanted: Rows) -> Tensor:
        """Return made rows that are copies, in the dtype of the tensor."""
        import torch

        made = self.rows.made
        values = torch.zeros(len(wanted), self.width, dtype=getattr(torch, self.dtype.name))
        filled = np.flatnonzero(made.starts[wanted + 1] > made.starts[wanted])
        terms = made.starts[wanted[filled]]
        for source in np.unique(made.source[terms]):
            mine = made.source[terms] == source
            rows = pick_rows(reader, self.tensors[source], made.row[terms[mine]], self.width)
            values[torch.from_numpy(filled[mine])] = rows.to(values.dtype)
        return values

    def _summed(self, reader: ByteReader, wanted: Rows) -> Tensor:
        """Return made rows, summed in float64."""
        import torch

        made = self.rows.made
        counts = made.starts[wanted + 1] - made.starts[wanted]
        values = torch.zeros(len(wanted), self.width, dtype=torch.float64)
        short = np.flatnonzero(counts <= _LONG)
        if len(short):
            values[torch.from_numpy(short)] = self._sums(reader, wanted[short])
        for place in np.flatnonzero(counts > _LONG):
            number = int(wanted[place])
            if number not in self.kept:
                # the value does not depend on the thread, so it does not matter if two compute it at once
                self.kept[number] = self._sums(reader, wanted[place : place + 1])[0]
            values[place] = self.kept[number]
        return values

    def _sums(self, reader: ByteReader, wanted: Rows) -> Tensor:
        """Return weighted sums of rows, float64, each summed in the order of its terms' tensors and rows."""
        import torch

        made = self.rows.made
        values = torch.zeros(len(wanted), self.width, dtype=torch.float64)
        counts = made.starts[wanted + 1] - made.starts[wanted]
        bag = np.repeat(np.arange(len(wanted)), counts)
        terms = np.concatenate([np.arange(made.starts[each], made.starts[each + 1]) for each in wanted])
        order = np.lexsort((made.row[terms], made.source[terms], bag))
        terms, bag = terms[order], bag[order]
        for source in np.unique(made.source[terms]):
            mine = made.source[terms] == source
            table, place = np.unique(made.row[terms[mine]], return_inverse=True)
            step = max(1, 4 * _SLAB // self.width)
            for at in range(0, len(table), step):
                rows = pick_rows(reader, self.tensors[source], table[at : at + step], self.width).to(torch.float64)
                near = (place >= at) & (place < at + step)
                starts = np.searchsorted(bag[mine][near], np.arange(len(wanted)))
                values += torch.nn.functional.embedding_bag(
                    torch.from_numpy(place[near] - at),
                    rows,
                    torch.from_numpy(starts),
                    mode="sum",
                    per_sample_weights=torch.from_numpy(made.weight[terms[mine]][near]),
                )
        return values


def pick_rows(reader: ByteReader, tensor: TensorInfo, rows: Rows, width: int) -> Tensor:
    """Read rows of a tensor in its own dtype, shape [len(rows), width]; rows that lie close are read together."""
    import torch

    wanted, place = np.unique(rows, return_inverse=True)
    found = torch.empty(len(wanted), width, dtype=getattr(torch, tensor.dtype.name))
    nbytes = width * tensor.dtype.itemsize
    gap, span = max(1, _GAP // nbytes), max(1, _SPAN // nbytes)
    at = 0
    cuts = np.flatnonzero(np.diff(wanted) > gap) + 1
    for end in [*cuts.tolist(), len(wanted)]:
        while at < end:
            upto = int(np.searchsorted(wanted[:end], wanted[at] + span))
            first, last = int(wanted[at]), int(wanted[upto - 1]) + 1
            values = read_elements(reader, tensor, first * width, last * width).view(-1, width)
            whole = last - first == upto - at
            found[at:upto] = values if whole else values[torch.from_numpy(wanted[at:upto] - first)]
            at = upto
    return found[torch.from_numpy(place)]
