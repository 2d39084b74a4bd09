"""Compare the task vectors of models that were trained from one base."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..adapters import open_reference
from ..anatomy import Part
from ..checkpoint import Checkpoint, TensorInfo
from ..errors import CheckpointError, suggest_keywords
from ..process import one_thread
from .side_by_side import Blocks, anatomy_of, reader_of, widen, with_ties

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FAR", "Kin", "Kinship", "LeftOut", "TensorKin", "kinship", "mean_of_pairs"]

FAR = 0.002
"""Largest change of an element that the authors of DARE found in most fine-tuned models (arXiv:2311.03099)."""

Matrix = Sequence[Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Kin:
    """How models are related, over some tensors taken as one vector; all sums are in float64.

    Lists have one value per model, matrices one row and column per model, both in the order given. Undefined values
    (a cosine with a task vector of zeros) are None.

    Args:
        tensors: Number of tensors.
        parameters: Number of elements.
        norm: Norm of each task vector, that is the Euclidean distance of the model from the base.
        change: Norm of each task vector over the norm of the base.
        rounding: Share of the norm of each task vector that is due to rounding of the stored model, at most 1.
        base_cosine: Cosine between the weights of each model and those of the base.
        weight_cosine: Cosine between the weights of each pair of models.
        changed: Share of the elements that differ from the base.
        far: Share of the elements that differ from the base by more than `FAR`.
        largest: The largest difference from the base.
        cosine: Cosine of each pair of task vectors.
        correlation: Pearson correlation between the elements of each pair of task vectors.
        distance: Euclidean distance between each pair of models.
        sign_conflict: Of the elements that both models changed, the share that they changed in opposite directions.
    """

    tensors: int
    parameters: int
    norm: Sequence[float]
    change: Sequence[float | None]
    rounding: Sequence[float | None]
    base_cosine: Sequence[float | None]
    weight_cosine: Matrix
    changed: Sequence[float]
    far: Sequence[float]
    largest: Sequence[float]
    cosine: Matrix
    correlation: Matrix
    distance: Matrix
    sign_conflict: Matrix


@dataclass(frozen=True, slots=True)
class TensorKin:
    """Kinship over one tensor, or over all tensors of a layer and role (no name); layer None: outside the layers."""

    name: str | None
    layer: int | None
    role: str
    kin: Kin


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor that could not be compared, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Kinship:
    """Result of `kinship`.

    Args:
        base: The base as given.
        models: The models as given.
        dtypes: Dtypes of the compared tensors, for the base and each model.
        total: Over all compared tensors.
        matrices: Without vectors (norms, biases), since these are similar even in unrelated models.
        same: Groups of checkpoints that are equal in every value; 0 is the base, 1 the first model.
        groups: By layer and role.
        tensors: By tensor, in the order of the base.
        left_out: Tensors that could not be compared.
    """

    base: str
    models: Sequence[str]
    dtypes: Sequence[Sequence[str]]
    total: Kin
    matrices: Kin
    same: Sequence[Sequence[int]]
    groups: Sequence[TensorKin]
    tensors: Sequence[TensorKin]
    left_out: Sequence[LeftOut]


@suggest_keywords
def kinship(
    models: Sequence[str | Path],
    base: str | Path,
    *,
    cache_dir: Path | None = None,
    stream: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Kinship:
    """Compare the task vectors of models; each model is streamed once, so only a few blocks are in memory at a time.

    Only float tensors that the base and every model contain in the same shape are compared.

    Args:
        models: Folders, weight files, or ids of models on the Hub (`org/name@revision`).
        base: The model that they were trained from.
        cache_dir: Folder for models from the Hub.
        stream: Read weights of models from the Hub by ranges, and keep none of them on the disk.
        progress: Called with the number of bytes compared so far and in total.

    Raises:
        NotFoundError: There is no such model.
        CheckpointError: One is damaged, or no tensor has the same name and shape in all.
        UnsupportedError: The weights of one cannot be read by ranges.
        UnreachableError: The Hub stopped answering.
        ValueError: There are no models.
    """
    if not models:
        raise ValueError("kinship takes at least one model")
    names = [str(base), *map(str, models)]
    checkpoints = [open_reference(name, cache_dir=cache_dir, stream=stream) for name in names]
    rows, parts, left_out = _align(names, checkpoints)
    if not rows:
        raise CheckpointError(f"{', '.join(names)}: have no tensor of the same name and shape, so none is compared")
    sums, not_finite = _measure(names, rows, progress)
    if not sums:
        raise CheckpointError(f"{', '.join(names)}: every tensor they share holds NaN or infinity")
    groups: dict[tuple[float, str], list[_Sums]] = defaultdict(list)
    for name, found in sums.items():
        layer = parts[name].layer
        groups[math.inf if layer is None else layer, parts[name].role].append(found)
    total = _together(sums.values())
    return Kinship(
        base=names[0],
        models=names[1:],
        dtypes=[list(dict.fromkeys(rows[name][i].dtype.name for name in sums)) for i in range(len(names))],
        total=total.kin(),
        matrices=_together([s for name, s in sums.items() if len(rows[name][0].shape) > 1] or sums.values()).kin(),
        same=_equal_groups(total.unequal),
        groups=[
            TensorKin(None, None if math.isinf(layer) else int(layer), role, _together(members).kin())
            for (layer, role), members in sorted(groups.items())
        ],
        tensors=[TensorKin(name, parts[name].layer, parts[name].role, found.kin()) for name, found in sums.items()],
        left_out=[*left_out, *not_finite],
    )


def mean_of_pairs(matrix: Matrix) -> float | None:
    """Return the mean of the defined values above the diagonal; None if there are none."""
    values = [value for i, row in enumerate(matrix) for value in row[i + 1 :] if value is not None]
    return sum(values) / len(values) if values else None


def _align(
    names: Sequence[str], checkpoints: Sequence[Checkpoint]
) -> tuple[dict[str, list[TensorInfo]], dict[str, Part], list[LeftOut]]:
    """Match tensors by name; return those that can be compared, their layers and roles, and why others cannot."""
    anatomies = [anatomy_of(checkpoint) for checkpoint in checkpoints]
    held = [with_ties(checkpoint, anatomy) for checkpoint, anatomy in zip(checkpoints, anatomies, strict=True)]
    rows: dict[str, list[TensorInfo]] = {}
    left_out = []
    for name in dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tensors):
        found = [tensors.get(name) for tensors in held]
        row = [tensor for tensor in found if tensor is not None]
        reason = ""
        if len(row) < len(found):
            reason = "missing in " + ", ".join(names[i] for i, tensor in enumerate(found) if tensor is None)
        elif len({tensor.shape for tensor in row}) > 1:
            odd = {n: t.shape for n, t in zip(names, row, strict=True) if t.shape != row[0].shape}
            reason = f"{list(row[0].shape)} in the base, " + ", ".join(f"{list(s)} in {n}" for n, s in odd.items())
        elif others := dict.fromkeys(tensor.dtype.name for tensor in row if tensor.dtype.kind != "float"):
            reason = f"holds {', '.join(others)}"
        if reason:
            left_out.append(LeftOut(name, reason))
        elif row[0].numel:
            rows[name] = row
    parts = {name: next(a.parts[name] for a in anatomies if name in a.parts) for name in rows}
    return rows, parts, left_out


def _measure(
    names: Sequence[str], rows: Mapping[str, Sequence[TensorInfo]], progress: Callable[[int, int], None] | None
) -> tuple[dict[str, _Sums], list[LeftOut]]:
    all_bytes = sum(tensor.nbytes for row in rows.values() for tensor in row)
    done = 0
    found, left_out = {}, []
    with reader_of(rows.values()) as reader, one_thread():
        blocks = Blocks(reader, len(names))
        for name, row in rows.items():
            sums = _Sums.nothing(len(names) - 1)
            for raw in blocks.numbers(row):
                wide = [widen(data, tensor) for data, tensor in zip(raw, row, strict=True)]
                sums.add(_measured(wide, sums.unequal))
                done += sum(len(data) for data in raw)
                if progress is not None:
                    progress(done, all_bytes)
            sums.tensors = 1
            if np.isfinite(sums.products).all():
                found[name] = sums
            else:
                left_out.append(LeftOut(name, "holds NaN or infinity"))
    return found, left_out


@dataclass(slots=True)
class _Sums:
    """Sums from which task vectors are compared, for T models.

    Args:
        tensors: Number of tensors.
        n: Number of elements.
        products: Inner products of the base (first) and the task vectors, shape [T + 1, T + 1].
        sums: Sum of the elements of each task vector, shape [T].
        both: For each pair of models, the number of elements that both changed, shape [T, T].
        opposite: How many of these elements the two changed in opposite directions, shape [T, T].
        far: Number of elements of each model that differ by more than `FAR` from the base, shape [T].
        largest: The largest difference of each model from the base, shape [T].
        rounding: Sum of the variances of the rounding of each model's values, shape [T].
        unequal: Whether two checkpoints (the base is the first) differ in any value, shape [T + 1, T + 1].
    """

    tensors: int
    n: int
    products: NDArray[np.float64]
    sums: NDArray[np.float64]
    both: NDArray[np.float64]
    opposite: NDArray[np.float64]
    far: NDArray[np.float64]
    largest: NDArray[np.float64]
    rounding: NDArray[np.float64]
    unequal: NDArray[np.bool_]

    @classmethod
    def nothing(cls, models: int) -> _Sums:
        """Return sums over no elements."""
        square, line = (models, models), np.zeros(models)
        products = np.zeros((models + 1, models + 1))
        unequal = np.zeros((models + 1, models + 1), dtype=bool)
        return cls(0, 0, products, line, np.zeros(square), np.zeros(square), line, line, line, unequal)

    def add(self, other: _Sums) -> None:
        """Add the sums over other elements."""
        self.tensors += other.tensors
        self.n += other.n
        self.products = self.products + other.products
        self.sums = self.sums + other.sums
        self.both = self.both + other.both
        self.opposite = self.opposite + other.opposite
        self.far = self.far + other.far
        self.largest = np.maximum(self.largest, other.largest)
        self.rounding = self.rounding + other.rounding
        self.unequal = self.unequal | other.unequal

    def kin(self) -> Kin:
        """Return the kinship that follows from the sums."""
        base, along, gram = self.products[0, 0], self.products[0, 1:], self.products[1:, 1:]
        squares = gram.diagonal()
        norms = np.sqrt(squares)
        weights = base + along[:, None] + along[None, :] + gram
        lengths = np.sqrt(np.maximum(weights.diagonal(), 0))
        # covariances times n; rounding leaves a small variance where a task vector is constant, which counts as 0
        centred = gram - np.outer(self.sums, self.sums) / self.n
        spread = np.sqrt(np.where(centred.diagonal() > 1e-12 * squares, centred.diagonal(), 0))
        return Kin(
            tensors=self.tensors,
            parameters=self.n,
            norm=norms.tolist(),
            change=_ratios(norms, np.sqrt(base)),
            rounding=_ratios(np.sqrt(self.rounding), norms, bound=1),
            base_cosine=_ratios(base + along, np.sqrt(base) * lengths, bound=1),
            weight_cosine=_table(weights, np.outer(lengths, lengths), bound=1),
            changed=(self.both.diagonal() / self.n).tolist(),
            far=(self.far / self.n).tolist(),
            largest=self.largest.tolist(),
            cosine=_table(gram, np.outer(norms, norms), bound=1),
            correlation=_table(centred, np.outer(spread, spread), bound=1),
            distance=np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0)).tolist(),
            sign_conflict=_table(self.opposite, self.both),
        )


def _together(parts: Iterable[_Sums]) -> _Sums:
    first, *others = parts
    total = _Sums.nothing(len(first.sums))
    for each in (first, *others):
        total.add(each)
    return total


def _measured(wide: Sequence[Tensor], unequal: NDArray[np.bool_]) -> _Sums:
    """Measure a block of the base and the models, float64; pairs that `unequal` marks are not compared again."""
    import torch

    from ..ops.linalg.rounding import rounding_norms

    base, *models = wide
    deltas = torch.stack(models) - base
    signs = deltas.sign().float()  # exact: a block has fewer elements than float32 can count
    moved = signs.abs()
    both = moved @ moved.T
    size = deltas.abs()
    rows = torch.cat([base[None], deltas])
    differ = unequal.copy()
    for i, j in combinations(range(len(wide)), 2):
        if not differ[i, j]:
            differ[i, j] = differ[j, i] = not torch.equal(wide[i], wide[j])
    return _Sums(
        tensors=0,
        n=base.numel(),
        products=(rows @ rows.T).numpy(),
        sums=deltas.sum(1).numpy(),
        both=both.double().numpy(),
        opposite=((both - signs @ signs.T) / 2).double().numpy(),
        far=(size > FAR).sum(1).double().numpy(),
        largest=size.amax(1).numpy(),
        # a model whose tensor equals the base was not trained there, so no rounding error counts
        rounding=torch.where(moved.any(1), rounding_norms(torch.stack(models)).square(), 0.0).numpy(),
        unequal=differ,
    )


def _ratios(above: ArrayLike, below: ArrayLike, bound: float = math.inf) -> list[float | None]:
    pairs = zip(*np.broadcast_arrays(above, below), strict=True)
    return [max(-bound, min(bound, float(a / b))) if b > 0 else None for a, b in pairs]


def _table(above: NDArray[np.float64], below: NDArray[np.float64], bound: float = math.inf) -> list[list[float | None]]:
    return [_ratios(a, b, bound) for a, b in zip(above, below, strict=True)]


def _equal_groups(unequal: NDArray[np.bool_]) -> list[list[int]]:
    """Return the groups of two or more equal checkpoints."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(unequal):
        groups[int(np.argmin(row))].append(i)
    return [members for members in groups.values() if len(members) > 1]
