"""The format of a folder of statistics, and how to read it.

        statistics.json                             model, data and settings, and the statistics of each tensor
    statistics-00001-of-00032.safetensors ...   the sums, named STATISTIC/TENSOR

With `x` the input of a matrix for one token, the sums over tokens are

    count           number of tokens, int64; for a tensor that holds all experts of a mixture one per expert
    magnitude       Σ |x|, float64, shape [in]
    second_moment   Σ x², float64, shape [in]
    gram            Σ x xᵀ, float32, shape [in, in]
    cross_gram      Σ x yᵀ, float32, shape [in, in], with y what the matrix of the model itself receives for this token

Matrices that receive the same inputs share their sums. `x` is computed by the model itself, or within a merge: by its
block behind merged blocks, or by merged blocks alone (`inputs` in statistics.json: "own", "prefix", "merged"). The last
two belong to one merge, whose hash is stored as `merge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Reader, TensorInfo
from ..checkpoint.formats.safetensors import read_header
from ..errors import DataError, MergeError
from ..jsonfile import Entry, read_object

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["COUNT", "STATISTICS_FORMAT", "STATISTICS_NAME", "Statistics", "TensorSums", "open_statistics", "sum_name"]

STATISTICS_NAME = "statistics.json"
STATISTICS_KIND = "statistics"
STATISTICS_FORMAT = 1
"""Increased when an older reader would misunderstand the files; a new key alone does not increase it."""

COUNT = "count"
"""The statistic that every folder contains."""


def sum_name(statistic: str, tensor: str) -> str:
    """Return the name of a sum in the files."""
    return f"{statistic}/{tensor}"


@dataclass(frozen=True, slots=True)
class TensorSums:
    """The place of the sums for a tensor of the checkpoint.

    Args:
        axis: The axis of the tensor that is contracted with the inputs.
        stored: The tensor under whose name the sums are stored.
    """

    axis: int
    stored: str


@dataclass(frozen=True)
class Statistics:
    """A folder of statistics.

    Args:
        path: The folder.
        about: Contents of statistics.json.
        statistics: Names of the statistics, `count` first.
        tensors: The checkpoint's tensors that have statistics, by name.
        sums: The place of each sum, by its name in the files.
    """

    path: Path
    about: Mapping[str, Any]
    statistics: tuple[str, ...]
    tensors: Mapping[str, TensorSums]
    sums: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """The bytes of all sums."""
        return sum(info.nbytes for info in self.sums.values())

    @property
    def inputs(self) -> str:
        """What computed the inputs: "own", "prefix" or "merged"."""
        return str(self.about.get("inputs", "own"))

    @property
    def merge(self) -> str | None:
        """Hash of the merge that they belong to; None if they are of the model alone."""
        return self.about.get("merge")

    def require(self, statistic: str) -> None:
        """Check that the folder contains a statistic.

        Raises:
            DataError: It does not.
        """
        if statistic not in self.statistics:
            raise DataError(
                f"{self.path}: has no {statistic!r}; it has {', '.join(self.statistics)}. "
                f"Calibrate again with --statistics {statistic}"
            )

    def info(self, statistic: str, tensor: str) -> TensorInfo:
        """Return the description of a sum: its file, offset, dtype and shape.

        Raises:
            DataError: The folder does not contain this statistic, or no statistics of this tensor.
        """
        self.require(statistic)
        if tensor not in self.tensors:
            raise DataError(f"{self.path}: has no entry for tensor {tensor!r}")
        return self.sums[sum_name(statistic, self.tensors[tensor].stored)]

    def read(self, reader: Reader, statistic: str, tensor: str) -> Tensor:
        """Return a sum, in the dtype and shape in which it is stored.

        Raises:
            DataError: As `info`.
            CheckpointError: The file cannot be read.
        """
        return reader.tensor(self.info(statistic, tensor))


def open_statistics(folder: str | Path) -> Statistics:
    """Open a folder of statistics by reading its headers.

    Raises:
        DataError: The folder is missing, damaged, or has another version.
    """
    path = Path(folder).expanduser()
    file = path / STATISTICS_NAME
    if not file.is_file():
        kind = "is no folder of statistics" if path.exists() else "there is no such folder"
        raise DataError(f"{folder}: {kind} (no {STATISTICS_NAME}); merganser calibrate writes one")
    try:
        about = read_object(file)
        return _open(path, about, Entry(about, str(file)))
    except DataError:
        raise
    except MergeError as error:
        raise DataError(str(error)) from None


def _open(path: Path, about: Mapping[str, Any], entry: Entry) -> Statistics:
    file = path / STATISTICS_NAME
    if entry["kind"].text() != STATISTICS_KIND:
        raise DataError(f"{file}: is no description of statistics; merganser calibrate writes one")
    if entry["format"].whole() != STATISTICS_FORMAT:
        raise DataError(
            f"{file}: has format {about['format']}, this version reads {STATISTICS_FORMAT}; calibrate again"
        )
    statistics = tuple(entry["statistics"].each(Entry.text))
    tensors = {name: TensorSums(own["axis"].whole(), own["stored"].text()) for name, own in entry["tensors"].items()}
    sums: dict[str, TensorInfo] = {}
    for name in entry["files"].each(Entry.text):
        if Path(name).name != name:
            raise DataError(f"{file}: files: {name!r} leaves the folder")
        infos, _ = read_header(path / name)
        sums.update((info.name, info) for info in infos)
    _check_complete(file, statistics, tensors, sums)
    return Statistics(path, about, statistics, tensors, sums)


def _check_complete(
    file: Path, statistics: Sequence[str], tensors: Mapping[str, TensorSums], sums: Mapping[str, TensorInfo]
) -> None:
    for name, own in tensors.items():
        for statistic in statistics:
            if sum_name(statistic, own.stored) not in sums:
                raise DataError(f"{file}: {statistic!r} of tensor {name!r} is in none of its files; calibrate again")
