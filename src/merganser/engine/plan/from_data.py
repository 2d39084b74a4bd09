"""Match statistics from calibration data to the tensors that are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...adapters import open_reference
from ...checkpoint import TensorInfo
from ...errors import RecipeError
from ...method import FromData, MergeMethod
from ...recipe import Inputs, ModelReference, Source
from ...statistics import COUNT, Statistics, open_statistics
from ...statistics.weights import weights_sample
from .tensor import PlannedTensor, SumFromData

__all__ = ["DataOfModels", "check_weights", "open_data", "with_data"]

_INPUTS = {
    "own": "what the model itself computes",
    "prefix": "what the model's blocks compute behind the merged blocks of a merge",
    "merged": "what the merged blocks of a merge compute",
}


@dataclass(frozen=True)
class DataOfModels:
    """The statistics from data of the models that a recipe merges, or of the base.

    Args:
        wanted: The statistics that the method takes, by argument name.
        sources: The models, as the recipe lists them; or the base.
        folders: The statistics of each of them, in that order.
    """

    wanted: Mapping[str, FromData]
    sources: Sequence[Source]
    folders: Sequence[Statistics]

    def of(self, models: Sequence[TensorInfo]) -> tuple[dict[str, tuple[SumFromData, ...]], bool]:
        """Return the statistics of one merged tensor, and whether its matrices are stored [inputs, outputs].

        Args:
            models: The tensor in each of the models, or in the base.

        Returns:
            One sum per model, by argument name. Empty if no model has statistics of this tensor.

        Raises:
            RecipeError: Only some models have statistics of it, or a shape does not fit the tensor.
        """
        axes = [
            own.tensors[tensor.name].axis if tensor.name in own.tensors else None for own, tensor in self._pairs(models)
        ]
        if all(axis is None for axis in axes):
            return {}, False
        for axis, source, tensor in zip(axes, self.sources, models, strict=True):
            if axis is None or axis != axes[0]:
                problem = "have no entry for" if axis is None else "count inputs along another axis of"
                raise RecipeError(
                    f"{source.place}: its statistics {problem} {tensor.name}, other models' do; calibrate all models "
                    "with the same version of merganser"
                )
        statistics = {
            name: tuple(self._sum(own, k, models[k]) for k in range(len(models))) for name, own in self.wanted.items()
        }
        return statistics, axes[0] == len(models[0].shape) - 2

    def check_merge(self, treatment: str) -> None:
        """Check that statistics that were measured within a merge belong to this one.

        Args:
            treatment: From `treatment_hash`, of all its tensors.

        Raises:
            RecipeError: They belong to another merge.
        """
        for own, source in zip(self.folders, self.sources, strict=True):
            if own.merge not in (None, treatment):
                raise RecipeError(
                    f"{source.place}: its statistics were measured within another merge: its parameters, models or dtypes "
                    "were others; measure again"
                )

    def _pairs(self, models: Sequence[TensorInfo]) -> list[tuple[Statistics, TensorInfo]]:
        return list(zip(self.folders, models, strict=True))

    def _sum(self, wanted: FromData, model: int, tensor: TensorInfo) -> SumFromData:
        folder = self.folders[model]
        total, count = folder.info(wanted.statistic, tensor.name), folder.info(COUNT, tensor.name)
        width = tensor.shape[folder.tensors[tensor.name].axis]
        lead = tensor.shape[:-2]
        if total.shape != (*lead, *wanted.shape(width)) or count.shape != lead:
            raise RecipeError(
                f"{self.sources[model].place}: its statistics are of another model: {wanted.statistic} of {tensor.name} "
                f"{list(tensor.shape)} has shape {list(total.shape)}, expected {[*lead, *wanted.shape(width)]}"
            )
        return SumFromData(total, count)


def open_data(method: MergeMethod, inputs: Inputs) -> DataOfModels | None:
    """Open the statistics from data that a recipe names.

    Args:
        method: The recipe's method.
        inputs: The models, and the base.

    Returns:
        The statistics; None if the method takes none.

    Raises:
        RecipeError: The recipe names statistics that the method does not take, or lacks statistics that it needs.
        DataError: A folder is missing, damaged, or lacks a statistic.
    """
    bases = () if inputs.base is None else (inputs.base,)
    used = {"models": inputs.models, "base": bases, "first": inputs.models[:1]}[method.data_of]
    used = used if method.from_data else ()
    for source in (*bases, *inputs.models):
        if source.statistics is not None and source not in used:
            of = ("of the base" if source in bases else "of this model") if method.from_data else "from data"
            raise RecipeError(f"{source.place} statistics: {method.name} uses no statistics {of}; leave the key out")
    if not method.from_data:
        return None
    sources = used
    wanted = ", ".join(dict.fromkeys(own.statistic for own in method.from_data.values()))
    folders: list[Statistics] = []
    for source in sources:
        if source.statistics is None:
            raise RecipeError(_missing(method, source, wanted))
        folder = open_statistics(source.statistics)
        if folder.inputs != method.data_inputs:
            raise RecipeError(
                f"{source.place}: its statistics are of {_INPUTS.get(folder.inputs, folder.inputs)}; {method.name} needs "
                f"those of {_INPUTS[method.data_inputs]}"
            )
        for own in method.from_data.values():
            folder.require(own.statistic)
        folders.append(folder)
    return DataOfModels(method.from_data, sources, folders)


def _missing(method: MergeMethod, source: Source, wanted: str) -> str:
    """Return what is to be done where a recipe names no statistics of a model."""
    of = "the base" if method.data_of == "base" else "this model"
    needed = f"{source.place}: {method.name} needs statistics of {of} from data ({wanted})"
    if method.data_inputs != "own":
        return f"{needed}, measured within the merge"
    listed = ", with the base listed among the models" if method.data_of == "base" else ""
    return (
        f"{needed}; write them with merganser calibrate {source.model} --data FILE --statistics {wanted} --out FOLDER, "
        f"and give the folder as 'statistics'{listed}"
    )


def with_data(tensor: PlannedTensor, data: DataOfModels | None) -> PlannedTensor:
    """Return a planned tensor with the statistics from data that its method takes of it.

    Raises:
        RecipeError: As `DataOfModels.of`.
    """
    if data is None or tensor.copy or not tensor.method.from_data:
        return tensor
    taken = {"models": tensor.models, "base": tensor.inputs[:1], "first": tensor.models[:1]}
    sums, turned = data.of(taken[tensor.method.data_of])
    return replace(tensor, data=sums, turned=turned)


def check_weights(data: Sequence[DataOfModels | None], cache_dir: Path | None) -> None:
    """Check that statistics are of the weights that are merged, by a sample of these.

    Args:
        data: The statistics of each slice.
        cache_dir: Folder for models from the Hub.

    Raises:
        RecipeError: Some are of other weights.
    """
    samples: dict[ModelReference, str] = {}
    for own in data:
        for source, folder in zip(own.sources, own.folders, strict=True) if own is not None else ():
            found = folder.about["model"]
            if source.model not in samples:
                # opened as calibrate does, since planning may rename tensors or leave some out
                samples[source.model] = weights_sample(open_reference(str(source.model), cache_dir=cache_dir))
            # statistics of an earlier version have no sample
            if found.get("sample", samples[source.model]) != samples[source.model]:
                raise RecipeError(
                    f"{source.place} statistics: {folder.path} is of other weights than {source.model}: of "
                    f"{found['reference']}, or of this model as it was then. Calibrate this model, or write "
                    "'check_statistics: false' at the top of the recipe to take them as they are"
                )
