"""Singular values of task vectors, which show how many directions a fine-tune or a merge changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..adapters import open_reference
from ..anatomy import Part
from ..checkpoint import Checkpoint, Reader, TensorInfo, open_checkpoint
from ..errors import CheckpointError
from .side_by_side import anatomy_of, with_ties

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Decay", "MatrixSpectra", "Spectra", "measure_spectra"]

LAYERS = 3
"""Number of layers whose matrices are measured: the first, the last, and others evenly spaced between them."""

POINTS = 48
"""Largest number of singular values that are kept of each matrix, at logarithmically spaced ranks."""

SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Decay:
    """Singular values of a task vector.

    Args:
        ranks: Ranks of some singular values, 1 for the largest.
        values: Those singular values over the largest; empty for a task vector that is zero or not finite.
        needed: For each of `SHARES`, the number of singular values that make up this share of the squared norm.
    """

    ranks: Sequence[int]
    values: Sequence[float]
    needed: Sequence[int]


@dataclass(frozen=True, slots=True)
class MatrixSpectra:
    """Spectra of one matrix: a `Decay` for each model, then one for the merge."""

    name: str
    layer: int
    role: str
    shape: tuple[int, int]
    decays: Sequence[Decay]


@dataclass(frozen=True, slots=True)
class Spectra:
    """Spectra of the task vectors of the models and of the merge; `base` and `models` are as given."""

    base: str
    models: Sequence[str]
    matrices: Sequence[MatrixSpectra]


def measure_spectra(
    out: str | Path,
    base: str,
    models: Sequence[str],
    *,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Spectra:
    """Measure singular values of task vectors in `LAYERS` layers, with one matrix of a model in memory at a time.

    They are square roots of eigenvalues of a Gram matrix in float64, so values below 1e-7 of the largest are noise.

    Args:
        out: Folder of the merge.
        base: The base, from which models and merge are measured: a folder, file or Hub id.
        models: The models.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of matrices done and in total.

    Raises:
        NotFoundError: A checkpoint does not exist.
        CheckpointError: A checkpoint is damaged, or no matrix is in all of them.
    """
    checkpoints = [open_reference(each, cache_dir=cache_dir) for each in (base, *models)]
    checkpoints.append(open_checkpoint(str(out)))
    chosen = list(_choose(checkpoints))
    if not chosen:
        raise CheckpointError(f"{out}: shares no matrix in a layer with {base} and all models, so there are no spectra")
    found = []
    with Reader() as reader:
        for done, (part, row) in enumerate(chosen, 1):
            origin = reader.tensor(row[0]).double()
            decays = [decay(reader.tensor(tensor).double() - origin) for tensor in row[1:]]
            rows, columns = row[0].shape
            found.append(MatrixSpectra(part.name, part.layer or 0, part.role, (rows, columns), decays))
            if progress is not None:
                progress(done, len(chosen))
    return Spectra(base, list(models), found)


def decay(delta: Tensor) -> Decay:
    """Measure the singular values of a matrix, float64."""
    import torch

    if not torch.isfinite(delta).all():
        return Decay([], [], [])
    wide = delta if delta.shape[0] <= delta.shape[1] else delta.T
    squares = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp(min=0).numpy()
    if not squares[0] > 0:
        return Decay([], [], [])
    ranks = np.unique(np.geomspace(1, len(squares), min(POINTS, len(squares))).round().astype(int))
    held = np.cumsum(squares) / squares.sum()
    # by rounding, the last cumulative sum may be slightly below 1
    needed = [min(int(np.searchsorted(held, share)) + 1, len(squares)) for share in SHARES]
    return Decay(ranks.tolist(), np.sqrt(squares[ranks - 1] / squares[0]).tolist(), needed)


def _choose(checkpoints: Sequence[Checkpoint]) -> Iterator[tuple[Part, list[TensorInfo]]]:
    """Yield the matrices of the chosen layers of the main stack that all checkpoints contain, in the same shape."""
    anatomies = [anatomy_of(checkpoint) for checkpoint in checkpoints]
    held: list[Mapping[str, TensorInfo]] = [with_ties(c, a) for c, a in zip(checkpoints, anatomies, strict=True)]
    count = anatomies[0].n_layers
    layers = {round(i * (count - 1) / (LAYERS - 1)) for i in range(LAYERS)}
    for name, part in anatomies[0].parts.items():
        row = [tensors[name] for tensors in held if name in tensors]
        alike = len(row) == len(held) and len({tensor.shape for tensor in row}) == 1
        if part.layer not in layers or part.position != "layer" or not alike:
            continue
        if len(row[0].shape) == 2 and min(row[0].shape) > 1 and all(tensor.dtype.kind == "float" for tensor in row):
            yield part, row
