"""The format of a folder of statistics, and how to read it.

        statistics.json                             model, data and settings, and the statistics of each tensor
    statistics-00001-of-00032.safetensors ...   the sums, named STATISTIC/TENSOR

With `x` the input of a matrix for one token, the sums over tokens are

    count           number of tokens, int64; for a tensor that holds all experts of a mixture one per expert
    magnitude       Σ |x|, float64, shape [in]
    second_moment   Σ x², float64, shape [in]
    gram            Σ x xᵀ, float32, shape [in, in]
    cross_gram      Σ x yᵀ, float32, shape [in, in], with y what the matrix of the model itself receives for this token, and
                    x what it receives in the merged model, or the mean of what it receives in all models

Of coefficients that were fitted within a merge, for every tensor of a block,

    coefficients    of the task vector, float32, shape [chunks]: no sum; `count` is the number of tokens they were fitted to

Of hidden units that were joined within a merge, for every tensor that holds some,

    groups          of each output and each input, axis after axis, float32, shape [rows + columns]: no sum; inputs are
                    numbered from -1 downwards

Matrices that receive the same inputs share their sums. `x` is computed by the model itself, or within a merge: by its
block behind merged blocks, or by merged blocks alone, or it is the mean over all models (`inputs` in statistics.json:
"own", "prefix", "merged", "mean"; "fitted" for coefficients, "end_to_end" for those that were learnt with the whole merged
model, and "zipped" for groups). All but "own" belong to one merge, whose hash is stored as `merge`.

With `g` the gradient of the loss of one sequence, which is the negative log-likelihood of its tokens that count, the sums
over sequences are

    fisher              Σ g², float32, in the shape of the tensor
    gradient            Σ g, float32, in the shape of the tensor
    absolute_gradient   Σ |g|, float32, in the shape of the tensor
    sensitivity         Σ |w g| over all entries w of the tensor, float64, 0-d
    gradient_gram       Σ g gᵀ over tokens, with g for the output of a matrix, float32, shape [out, out]
    loss                the loss, float64, 0-d, for the whole model
    predictions         number of tokens in the loss, int64, 0-d, for the whole model
    losses              the loss of each sequence, float64, shape [sequences], in the order in which they were drawn
"""

from __future__ import annotations

import math
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

__all__ = [
    "COUNT",
    "LOSS",
    "LOSSES",
    "PREDICTIONS",
    "STATISTICS_FORMAT",
    "STATISTICS_KIND",
    "STATISTICS_NAME",
    "Statistics",
    "TensorSums",
    "check_values",
    "open_statistics",
    "sum_name",
]

STATISTICS_NAME = "statistics.json"
STATISTICS_KIND = "statistics"
STATISTICS_FORMAT = 1
"""Increased when an older reader would misunderstand the files; a new key alone does not increase it."""

COUNT = "count"
"""The statistic that every folder contains."""

LOSS = "loss"
"""The sum of all losses; every folder with statistics of gradients contains it."""

PREDICTIONS = "predictions"
"""The number of tokens in the loss."""

LOSSES = "losses"
"""The loss of each sequence; statistics of parts of the data are joined, not added."""

_OF_INPUTS = (COUNT, "magnitude", "second_moment", "gram", "cross_gram", "coefficients", "groups")


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
        tensors: The checkpoint's matrices that have statistics of their inputs, by name.
        gradients: The statistics of gradients of each of the checkpoint's tensors, by name.
        sums: The place of each sum, by its name in the files.
    """

    path: Path
    about: Mapping[str, Any]
    statistics: tuple[str, ...]
    tensors: Mapping[str, TensorSums]
    gradients: Mapping[str, tuple[str, ...]]
    sums: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """The bytes of all sums."""
        return sum(info.nbytes for info in self.sums.values())

    @property
    def inputs(self) -> str:
        """What computed the inputs: "own", "prefix", "merged", "mean", "fitted", "zipped" or "end_to_end"."""
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
        if not self.has(statistic, tensor):
            raise DataError(f"{self.path}: has no entry for tensor {tensor!r}")
        stored = self.tensors[tensor].stored if statistic in _OF_INPUTS else tensor
        return self.sums[sum_name(statistic, stored)]

    def has(self, statistic: str, tensor: str) -> bool:
        """Return whether the folder contains a statistic of a tensor."""
        if statistic in _OF_INPUTS:
            return statistic in self.statistics and tensor in self.tensors
        return statistic in self.gradients.get(tensor, ())

    def of_model(self, name: str) -> TensorInfo:
        """Return the description of a sum over the whole model: LOSS or PREDICTIONS.

        Raises:
            DataError: The folder does not contain it.
        """
        self.require(LOSS)
        return self.sums[name]

    @property
    def of_inputs(self) -> tuple[str, ...]:
        """Names of the statistics of inputs of matrices, without the number of tokens."""
        return tuple(name for name in self.statistics if name in _OF_INPUTS and name != COUNT)

    @property
    def loss(self) -> float | None:
        """The mean loss, nats per token; None if the folder does not contain it."""
        return self._scalar(LOSS) / max(self.predictions, 1) if LOSS in self.statistics else None

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss of each sequence, nats, in the order in which they were drawn.

        Raises:
            DataError: The folder does not contain them.
        """
        self.require(LOSS)
        if LOSSES not in self.sums:
            raise DataError(f"{self.path}: has no losses of single sequences; calibrate again with --statistics {LOSS}")
        with Reader() as reader:
            found = reader.tensor(self.sums[LOSSES])
        check_values(self.sums[LOSSES], found)
        return tuple(found.tolist())

    @property
    def predictions(self) -> int:
        """The number of tokens in the loss; 0 if the folder does not contain one."""
        return int(self._scalar(PREDICTIONS)) if LOSS in self.statistics else 0

    def sensitivity(self, tensor: str) -> float:
        """Return the mean over tokens of `Σ |w g|` of a tensor.

        Raises:
            DataError: The folder does not contain it.
        """
        return self._scalar(self.info("sensitivity", tensor).name) / max(self.predictions, 1)

    def _scalar(self, name: str) -> float:
        with Reader() as reader:
            found = reader.tensor(self.sums[name])
        check_values(self.sums[name], found)
        return float(found)

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
        kind = "is not a folder of statistics" if path.exists() else "there is no such folder"
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
        raise DataError(f"{file}: is not a description of statistics; merganser calibrate writes one")
    if entry["format"].whole() != STATISTICS_FORMAT:
        raise DataError(
            f"{file}: has format {about['format']}, this version reads {STATISTICS_FORMAT}; calibrate again"
        )
    _check_about(entry)
    statistics = tuple(entry["statistics"].each(Entry.text))
    tensors = {name: TensorSums(own["axis"].whole(), own["stored"].text()) for name, own in entry["tensors"].items()}
    gradients: dict[str, tuple[str, ...]] = {}
    if "gradients" in about:
        gradients = {name: tuple(own.each(Entry.text)) for name, own in entry["gradients"].items()}
    sums: dict[str, TensorInfo] = {}
    files = entry["files"].each(Entry.text)
    for number, name in enumerate(files):
        if Path(name).name != name:
            raise DataError(f"{file}: files: {name!r} leaves the folder")
        if name in files[:number]:
            raise DataError(f"{file}: files: {name!r} is named twice")
        infos, _ = read_header(path / name)
        for info in infos:
            if info.name in sums:
                raise DataError(
                    f"{file}: {info.name!r} is in {sums[info.name].file.name} and in {name}; calibrate again"
                )
            sums[info.name] = info
    needed = [
        (statistic, name, own.stored)
        for name, own in tensors.items()
        for statistic in statistics
        if statistic in _OF_INPUTS
    ]
    needed += [(statistic, name, name) for name, own in gradients.items() for statistic in own]
    _check_complete(file, needed, sums)
    for name in (LOSS, PREDICTIONS) if LOSS in statistics else ():
        if name not in sums:
            raise DataError(f"{file}: {name!r} is in none of its files; calibrate again")
    for info in sums.values():
        _check_kind(info)
    return Statistics(path, about, statistics, tensors, gradients, sums)


def _check_about(entry: Entry) -> None:
    """Check what is said of the model and the data, which may come from others.

    Raises:
        MergeError: Something is missing, or has another type.
    """
    for key in ("reference", "hash"):
        entry["model"][key].text()
    sample = entry["model"].get("sample")
    if sample is not None:
        sample.text()
    entry["tokenizer"].text()
    if not entry["parts"].each(_check_part):
        entry["parts"].refuse("a list with an entry for each part of the data")


def _check_part(part: Entry) -> None:
    for key in ("sequences", "tokens", "counted"):
        part[key].whole()
    part["data"].each(lambda data: (data["file"].text(), data["hash"].text()))


def _check_kind(info: TensorInfo) -> None:
    """Check dtype and shape of a sum.

    Raises:
        DataError: They are not those of its statistic.
    """
    statistic = info.name.partition("/")[0]
    wanted = "int" if statistic in (COUNT, PREDICTIONS) else "float"
    if info.dtype.kind != wanted:
        what = "whole numbers" if wanted == "int" else "floating-point numbers"
        raise DataError(f"{info.file}: {info.name!r} is {info.dtype.name}, not {what}; calibrate again")
    axes = {LOSS: 0, PREDICTIONS: 0, LOSSES: 1}.get(info.name)
    if axes is not None and len(info.shape) != axes:
        raise DataError(
            f"{info.file}: {info.name!r} has shape {list(info.shape)}, expected {axes} axes; calibrate again"
        )


_NEVER_NEGATIVE = ("magnitude", "second_moment", "fisher", "absolute_gradient")
_SQUARES_ON_DIAGONAL = ("gram", "gradient_gram")
# rows at a time, and how far a Gram matrix may be from what one can be: sums that were stored in 16 bits are rounded
_PANEL, _ROUNDING = 64, 1e-2


def check_values(info: TensorInfo, values: Tensor) -> None:
    """Check values of a sum, or of a part of it: statistics may come from others, and damage would pass into a merge.

    Args:
        info: The sum.
        values: Its values, or some of them.

    Raises:
        DataError: They are not finite, less than 0 where that cannot be, or no Gram matrix where one is expected.
    """
    if not values.numel():
        return
    statistic = info.name.partition("/")[0]
    # needs no memory of the size of a Gram matrix
    least, most = (float(end) for end in values.aminmax())
    if not (math.isfinite(least) and math.isfinite(most)):
        raise DataError(f"{info.file}: {info.name} holds NaN or infinity; calibrate again")
    if statistic in _SQUARES_ON_DIAGONAL and values.dim() > 1:
        least = float(values.diagonal(dim1=-2, dim2=-1).min())
    elif statistic not in (*_NEVER_NEGATIVE, COUNT):
        return
    if least < 0:
        raise DataError(
            f"{info.file}: {info.name} holds {least:.4g}, which no sum of such values can be; calibrate again"
        )
    if statistic in _SQUARES_ON_DIAGONAL and values.dim() > 1:
        for matrix in values.unsqueeze(0).flatten(0, -3):
            _check_gram(info, matrix)


def _check_gram(info: TensorInfo, matrix: Tensor) -> None:
    """Check a panel of rows at a time that entries are symmetric, and at most the root of their two squares.

    Raises:
        DataError: They are not.
    """
    roots = matrix.diagonal().double().sqrt()
    for start in range(0, len(matrix), _PANEL):
        rows, most = matrix[start : start + _PANEL].double(), roots[start : start + _PANEL, None] * roots
        # and entries that no 16 bits can tell from 0 beside the largest
        slack = _ROUNDING * most + 1e-6 * float(roots.max()) ** 2
        beyond = rows.abs() - most > slack
        if beyond.any() or ((rows - matrix[:, start : start + _PANEL].T).abs() > slack).any():
            what = "entries beyond the root of their squares" if beyond.any() else "two halves that differ"
            raise DataError(f"{info.file}: {info.name} has {what}, which no Gram matrix has; calibrate again")


def _check_complete(file: Path, needed: Sequence[tuple[str, str, str]], sums: Mapping[str, TensorInfo]) -> None:
    for statistic, name, stored in needed:
        if sum_name(statistic, stored) not in sums:
            raise DataError(f"{file}: {statistic!r} of tensor {name!r} is in none of its files; calibrate again")
