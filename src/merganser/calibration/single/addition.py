"""Add statistics that were collected on several parts of the data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint import Reader, TensorInfo
from ...errors import DataError
from ...statistics import LOSSES, Statistics, check_values, open_statistics
from ..output.target import Target
from ..output.writer import Sum, write_about, write_sums
from .preparation import fingerprint

__all__ = ["add_statistics"]

# keys that must be equal in statistics that are added
_SAME = {
    "model": "are of another model",
    "tokenizer": "are of another tokenizer",
    "statistics": "have other statistics",
    "tensors": "are of other tensors",
    "gradients": "have gradients of other tensors",
    "labels": "have a loss with other labels",
}


def add_statistics(folders: Sequence[str | Path], out: str | Path) -> Statistics:
    """Add statistics of one model on several parts of the data; the sums equal those of one pass over all the data.

    Args:
        folders: Two or more folders of statistics.
        out: The folder to write; it must not exist.

    Raises:
        DataError: The statistics are of different models or kinds, or within a merge, damaged, or two are of the same data.
        OutputError: `out` exists or cannot be written.
    """
    parts = [open_statistics(folder) for folder in folders]
    if len(parts) < 2:
        raise DataError(f"adding statistics: needs two or more folders, found {len(parts)}")
    for part in parts:
        _check_own(part)
    first = parts[0]
    for part in parts[1:]:
        _check_alike(first, part)
    pieces = [(piece, part) for part in parts for piece in part.about["parts"]]
    for number, (piece, part) in enumerate(pieces):
        if any(piece == earlier for earlier, _ in pieces[:number]):
            raise DataError(f"{part.path}: is computed from data that another folder covers, too; it would count twice")
    identity = {"addition": [dict(part.about) for part in parts]}
    with Target(Path(out), fingerprint(identity, 0)) as target, Reader() as reader:
        if not target.finished:
            target.claim(first.about["files"])
            for file in first.about["files"]:
                infos = {name: info for name, info in first.sums.items() if info.file.name == file}
                sums = {
                    name: Sum(_shape(name, parts), info.dtype.name, partial(_added, name, parts, reader))
                    for name, info in infos.items()
                }
                write_sums(target.folder / file, sums)
            write_about(target.folder, {**first.about, "parts": [piece for piece, _ in pieces]})
        target.publish()
    return open_statistics(out)


def _shape(name: str, parts: Sequence[Statistics]) -> tuple[int, ...]:
    if name == LOSSES:
        return (sum(part.sums[name].shape[0] for part in parts),)
    return parts[0].sums[name].shape


def _added(name: str, parts: Sequence[Statistics], reader: Reader) -> Tensor:
    def read(info: TensorInfo) -> Tensor:
        tensor = reader.tensor(info)
        check_values(info, tensor)
        return tensor.double() if tensor.is_floating_point() else tensor

    # they are per sequence, so there is nothing to add
    if name == LOSSES:
        return torch.cat([read(part.sums[name]) for part in parts])
    total = read(parts[0].sums[name])
    for part in parts[1:]:
        total += read(part.sums[name])
    return total


def _check_own(part: Statistics) -> None:
    """Check that they are of a model alone, and not of what it computes within one merge, whose data cannot grow.

    Raises:
        DataError: They belong to a merge.
    """
    if part.inputs != "own" or part.merge is not None:
        raise DataError(
            f"{part.path}: was measured within one merge and belongs to its data; only statistics of a model alone can be "
            "added: merganser calibrate writes them"
        )


def _check_alike(first: Statistics, other: Statistics) -> None:
    for key, complaint in _SAME.items():
        # compare hashes of models, since the same model may have another path
        one, two = (own.about[key]["hash"] if key == "model" else own.about.get(key) for own in (first, other))
        if one != two:
            raise DataError(f"{other.path}: its statistics {complaint} than those of {first.path}, and cannot be added")
    for name, info in first.sums.items():
        if name not in other.sums or (name != LOSSES and other.sums[name].shape != info.shape):
            raise DataError(f"{other.path}: {name!r} is missing or has another shape than in {first.path}")
