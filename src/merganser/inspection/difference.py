"""Measure the distance between two checkpoints, by tensor and by layer and role."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..adapters import open_reference
from ..anatomy import Part
from ..checkpoint import TensorInfo
from ..errors import CheckpointError, suggest_keywords
from ..process import one_thread
from .side_by_side import Blocks, anatomy_of, reader_of, widen, with_ties
from .task_vectors import FAR

__all__ = ["Difference", "Distance", "GroupDistance", "MisshapenTensor", "TensorDistance", "diff"]


@dataclass(frozen=True, slots=True)
class Distance:
    """Distance of B from A; all sums are in float64.

    The numbers are None if a value is not finite, and for tensors that are not floats (integers, quantised values).

    Args:
        identical: Whether A and B are equal, byte for byte.
        relative_change: Norm of A - B over the norm of A; None also if A is zero and B is not.
        cosine: Cosine of the angle between A and B as vectors; None also if one of them is zero.
        largest: The largest |A - B|.
    """

    identical: bool
    relative_change: float | None
    cosine: float | None
    largest: float | None


@dataclass(frozen=True, slots=True)
class TensorDistance:
    """The distance of one tensor; `layer` is None outside the layers, `dtypes` are those of A and B."""

    name: str
    layer: int | None
    role: str
    parameters: int
    dtypes: tuple[str, str]
    distance: Distance


@dataclass(frozen=True, slots=True)
class GroupDistance:
    """The distance of all tensors of a layer and role, taken as one vector."""

    layer: int | None
    role: str
    tensors: int
    parameters: int
    distance: Distance


@dataclass(frozen=True, slots=True)
class MisshapenTensor:
    """A tensor that both checkpoints contain, in different shapes."""

    name: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """Result of `diff`.

    Args:
        a: The first checkpoint as given.
        b: The second checkpoint as given.
        total: Distance over all compared tensors.
        matrices: Distance without vectors (norms, biases), since these are similar even in unrelated models.
        far: Share of the elements that differ by more than `task_vectors.FAR`; None if the total has no numbers.
        tensors: Every compared tensor, in the order of A.
        groups: Distances by layer and role.
        only_in_a: Names that B lacks.
        only_in_b: Names that A lacks.
        misshapen: Tensors that were not compared because their shapes differ.
    """

    a: str
    b: str
    total: Distance
    matrices: Distance
    far: float | None
    tensors: Sequence[TensorDistance]
    groups: Sequence[GroupDistance]
    only_in_a: Sequence[str]
    only_in_b: Sequence[str]
    misshapen: Sequence[MisshapenTensor]

    @property
    def identical(self) -> bool:
        """Whether both contain the same tensors, equal byte for byte."""
        return self.total.identical and not (self.only_in_a or self.only_in_b or self.misshapen)


@dataclass(slots=True)
class _Sums:
    """Sums from which two vectors are compared; `numbers` is False if no tensor of floats was added."""

    identical: bool = True
    numbers: bool = False
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    n: int = 0
    far: int = 0
    largest: float = 0.0

    def add(self, other: _Sums) -> None:
        """Add the sums of another part of the vectors."""
        self.identical &= other.identical
        self.numbers |= other.numbers
        self.aa += other.aa
        self.bb += other.bb
        self.ab += other.ab
        self.dd += other.dd
        self.n += other.n
        self.far += other.far
        # max() may lose a NaN, but `dd` is then NaN, too
        self.largest = max(self.largest, other.largest)

    def distance(self) -> Distance:
        """Return the distance that follows from the sums."""
        if not self.numbers or not all(map(math.isfinite, (self.aa, self.bb, self.ab, self.dd, self.largest))):
            return Distance(self.identical, None, None, None)
        change = None
        if self.aa > 0:
            change = math.sqrt(self.dd / self.aa)
        elif self.dd == 0:
            change = 0.0
        norms = math.sqrt(self.aa) * math.sqrt(self.bb)
        cosine = max(-1.0, min(1.0, self.ab / norms)) if norms > 0 else None
        return Distance(self.identical, change, cosine, self.largest)


@suggest_keywords
def diff(
    a: str | Path,
    b: str | Path,
    *,
    cache_dir: Path | None = None,
    stream: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compare two checkpoints; both are streamed, so only a few blocks are in memory at a time.

    Args:
        a: A folder, a weight file, or the id of a model on the Hub (`org/name@revision`).
        b: The other checkpoint.
        cache_dir: Folder for models from the Hub.
        stream: Read weights of models from the Hub by ranges, and keep none of them on the disk.
        progress: Called with the number of bytes compared so far and in total.

    Raises:
        NotFoundError: There is no such model.
        CheckpointError: One is damaged, or no tensor has the same name and shape in both.
        UnsupportedError: The weights of one cannot be read by ranges.
        UnreachableError: The Hub stopped answering.
    """
    first, second = (open_reference(str(each), cache_dir=cache_dir, stream=stream) for each in (a, b))
    structure_a, structure_b = anatomy_of(first), anatomy_of(second)
    tensors_a, tensors_b = with_ties(first, structure_a), with_ties(second, structure_b)
    common = [name for name in tensors_a if name in tensors_b and (name in first.tensors or name in second.tensors)]
    pairs = {name: (tensors_a[name], tensors_b[name]) for name in common}
    misshapen = [
        MisshapenTensor(name, one.shape, other.shape)
        for name, (one, other) in pairs.items()
        if one.shape != other.shape
    ]
    for tensor in misshapen:
        del pairs[tensor.name]
    if not pairs:
        raise CheckpointError(f"{a} and {b}: have no tensor of the same name and shape, so there is nothing to compare")
    sums = _compare(pairs, progress)
    parts = {name: structure_a.parts.get(name) or structure_b.parts[name] for name in pairs}
    total, matrices = (
        _summed(sums.values()),
        _summed(sums[name] for name, (one, _) in pairs.items() if len(one.shape) > 1),
    )
    return Difference(
        a=str(a),
        b=str(b),
        total=total.distance(),
        matrices=matrices.distance(),
        far=total.far / total.n if total.n and total.distance().largest is not None else None,
        tensors=[
            TensorDistance(
                name,
                parts[name].layer,
                parts[name].role,
                one.numel,
                (one.dtype.name, other.dtype.name),
                sums[name].distance(),
            )
            for name, (one, other) in pairs.items()
        ],
        groups=_groups(parts, pairs, sums),
        only_in_a=[name for name in first.tensors if name not in tensors_b],
        only_in_b=[name for name in second.tensors if name not in tensors_a],
        misshapen=misshapen,
    )


def _summed(each: Iterable[_Sums]) -> _Sums:
    together = _Sums()
    for own in each:
        together.add(own)
    return together


def _groups(
    parts: Mapping[str, Part], pairs: Mapping[str, tuple[TensorInfo, TensorInfo]], sums: Mapping[str, _Sums]
) -> list[GroupDistance]:
    """Return the distances of the tensors of each role in each layer; those outside the layers come last."""
    members: dict[tuple[float, str], list[str]] = defaultdict(list)
    for name, part in parts.items():
        members[math.inf if part.layer is None else part.layer, part.role].append(name)
    return [
        GroupDistance(
            None if math.isinf(layer) else int(layer),
            role,
            len(names),
            sum(pairs[name][0].numel for name in names),
            _summed(sums[name] for name in names).distance(),
        )
        for (layer, role), names in sorted(members.items())
    ]


def _compare(
    pairs: Mapping[str, tuple[TensorInfo, TensorInfo]], progress: Callable[[int, int], None] | None
) -> dict[str, _Sums]:
    all_bytes = sum(one.nbytes + other.nbytes for one, other in pairs.values())
    done = 0
    found = {}
    with reader_of(pairs.values()) as reader, one_thread():
        blocks = Blocks(reader, 2)
        for name, (one, other) in pairs.items():
            compare = _compare_numbers if one.dtype.kind == other.dtype.kind == "float" else _compare_bytes
            found[name] = _Sums()
            for sums, nbytes in compare(blocks, one, other):
                found[name].add(sums)
                done += nbytes
                if progress is not None:
                    progress(done, all_bytes)
    return found


def _compare_bytes(blocks: Blocks, one: TensorInfo, other: TensorInfo) -> Iterator[tuple[_Sums, int]]:
    """Compare two tensors that are not floats; yield the sums of each block and the bytes read for it."""
    if one.dtype != other.dtype:
        yield _Sums(identical=False), one.nbytes + other.nbytes
        return
    for a, b in blocks.bytes((one, other)):
        yield _Sums(identical=np.array_equal(a, b)), len(a) + len(b)


def _compare_numbers(blocks: Blocks, one: TensorInfo, other: TensorInfo) -> Iterator[tuple[_Sums, int]]:
    """Compare two tensors of floats; yield the sums of each block and the bytes read for it."""
    yield _Sums(identical=one.dtype == other.dtype, numbers=True), 0
    for raw in blocks.numbers((one, other)):
        a, b = widen(raw[0], one), widen(raw[1], other)
        apart = a - b
        size = apart.abs()
        sums = _Sums(
            identical=np.array_equal(raw[0], raw[1]),
            numbers=True,
            aa=float(a.dot(a)),
            bb=float(b.dot(b)),
            ab=float(a.dot(b)),
            dd=float(apart.dot(apart)),
            n=apart.numel(),
            far=int((size > FAR).sum()),
            largest=float(size.max()),
        )
        yield sums, sum(len(data) for data in raw)
