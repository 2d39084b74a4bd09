"""Match statistics from calibration data to the tensors that are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...adapters import open_reference
from ...checkpoint import Checkpoint, TensorInfo
from ...checkpoint.derived.gathered import with_rows_of
from ...errors import RecipeError
from ...method import FromData, MergeMethod, NumbersFromData
from ...recipe import Inputs, ModelReference, Source
from ...statistics import COUNT, PREDICTIONS, Statistics, open_statistics
from ...statistics.weights import weights_sample
from .tensor import PlannedTensor, SumFromData

__all__ = ["DataOfModels", "check_weights", "open_data", "with_data"]

_INPUTS: Mapping[str, str] = {
    "own": "what the model itself computes",
    "prefix": "what the model's blocks compute behind the merged blocks of a merge",
    "merged": "what the merged blocks of a merge compute",
    "fitted": "coefficients that were fitted within a merge",
    "end_to_end": "coefficients that were learnt with a whole merged model",
    "mean": "the mean of what all models of a merge compute",
    "zipped": "units that were joined within a merge",
}


@dataclass(frozen=True)
class DataOfModels:
    """The statistics from data of the models that a recipe merges, or of the base.

    Args:
        wanted: The statistics that the method takes, by argument name.
        numbers: The numbers that it takes, by argument name.
        sources: The models, as the recipe lists them; or the base.
        folders: The statistics of each of them, in that order; empty if the method takes none.
        base_folders: Those of the base on the data of each of them, likewise.
        base: The base; None if there is none.
    """

    wanted: Mapping[str, FromData]
    numbers: Mapping[str, NumbersFromData]
    sources: Sequence[Source]
    folders: Sequence[Statistics]
    base_folders: Sequence[Statistics] = ()
    base: Source | None = None

    def of(
        self, name: str, base: TensorInfo | None, models: Sequence[TensorInfo]
    ) -> tuple[dict[str, tuple[SumFromData, ...]], bool]:
        """Return the statistics of one merged tensor, and whether its matrices are stored [inputs, outputs].

        Args:
            name: The name of the merged tensor, by which statistics are known that were measured within the merge.
            base: The tensor in the base.
            models: The tensor in each of the models, or in the base.

        Returns:
            One sum per model, by argument name, without the statistics that no model has of this tensor.

        Raises:
            RecipeError: Only some models have a statistic of it, or a shape does not fit the tensor.
        """
        statistics: dict[str, tuple[SumFromData, ...]] = {}
        turned = False
        for argument, own in self.wanted.items():
            of_base = own.of == "base_on_models" and base is not None
            tensors = [base] * len(models) if of_base and base is not None else models
            folders = self.base_folders if of_base else self.folders
            names = [tensor.name_in_model if own.inputs == "own" else name for tensor in tensors]
            has = [folder.has(own.statistic, each) for folder, each in zip(folders, names, strict=True)]
            if not any(has):
                continue
            for source, each, given in zip(self.sources, names, has, strict=True):
                if not given:
                    raise RecipeError(
                        f"{source.place}: its statistics have no entry for {each}, but other models' have one; calibrate "
                        "all models with the same version of merganser"
                    )
            # what is no sum over inputs has the tensor's own layout
            axes = self._axes(folders, names, tensors) if own.summed else set()
            turned = turned or axes == {len(models[0].shape) - 2}
            statistics[argument] = tuple(
                self._sum(own, folder, source, each, tensor, turned=turned)
                for folder, source, each, tensor in zip(folders, self.sources, names, tensors, strict=True)
            )
        return statistics, turned

    def numbers_of(self, layers: Sequence[Mapping[str, int | None]]) -> dict[str, tuple[Any, ...]]:
        """Return the numbers that the method takes, by argument name: one entry per model.

        Args:
            layers: For each model, the layers of its tensors in the output, by name; None outside layers.
        """
        found: dict[str, tuple[Any, ...]] = {}
        for name, own in self.numbers.items():
            if own.statistic == "loss":
                found[name] = tuple(folder.loss for folder in self.folders)
            elif own.statistic == "losses":
                self._check_alike()
                found[name] = tuple(folder.losses for folder in self.folders)
            else:
                found[name] = tuple(map(_by_layer, self.folders, layers))
        return found

    def _check_alike(self) -> None:
        """Check that losses of single sequences are of the same ones in every model.

        Raises:
            RecipeError: They are of others.
        """
        for folder, source in zip(self.folders, self.sources, strict=True):
            first = self.folders[0]
            if any(folder.about[key] != first.about[key] for key in ("parts", "tokenizer")):
                raise RecipeError(
                    f"{source.place}: its losses are of other sequences than those of {self.sources[0].model}; the losses of "
                    "one text are compared between models: give all models the same data, and models of one tokenizer"
                )

    def check_merge(self, treatment: str) -> None:
        """Check that statistics that were measured within a merge belong to this one.

        Args:
            treatment: From `treatment_hash`, of all its tensors.

        Raises:
            RecipeError: They belong to another merge.
        """
        for own, source in zip(self.folders, self.sources, strict=False):
            if own.merge not in (None, treatment):
                raise RecipeError(
                    f"{source.place}: its statistics were measured within another merge: its parameters, models or dtypes "
                    "were others; measure again"
                )

    def _axes(self, folders: Sequence[Statistics], names: Sequence[str], tensors: Sequence[TensorInfo]) -> set[int]:
        """Return the axis along which a matrix takes its inputs; empty for a tensor that is not a matrix."""
        axes: set[int] = set()
        for folder, source, name, tensor in zip(folders, self.sources, names, tensors, strict=True):
            if name not in folder.tensors:
                continue
            axis = folder.tensors[name].axis
            if len(tensor.shape) - axis not in (1, 2):
                raise RecipeError(
                    f"{source.place}: its statistics are damaged: {name} {list(tensor.shape)} takes its inputs along "
                    f"axis {axis}, which is none of its last two; calibrate this model"
                )
            axes |= {axis}
            if len(axes) > 1:
                raise RecipeError(
                    f"{source.place}: its statistics have the inputs of {name} along another axis than other models' "
                    "do; calibrate all models with the same version of merganser"
                )
        return axes

    def _sum(
        self, own: FromData, folder: Statistics, source: Source, name: str, tensor: TensorInfo, *, turned: bool
    ) -> SumFromData:
        total = folder.info(own.statistic, name)
        count = folder.info(COUNT, name) if own.of_inputs else folder.of_model(PREDICTIONS)
        lead, rest = tensor.shape[:-2], tensor.shape[-2:]
        if not own.summed:
            one_axis = len(total.shape) == 1 and total.shape[0] > 0
            of_columns = len(total.shape) == len(tensor.shape) and all(
                size in (1, whole) for size, whole in zip(total.shape, tensor.shape, strict=True)
            )
            if not (one_axis or (own.learning is not None and of_columns)):
                raise RecipeError(
                    f"{source.place}: its statistics are damaged: {own.statistic} of {name} have shape "
                    f"{list(total.shape)}, expected one axis; measure again"
                )
            return SumFromData(total, count, summed=False)
        if own.elementwise:
            # its rows are those of the model, and the tensor's those of the merge's vocabulary
            total = with_rows_of(tensor, total)
        shape = tensor.shape if own.elementwise else (*lead, *own.shape(rest[::-1] if turned else rest))
        if total.shape != shape or (own.of_inputs and count.shape != lead):
            raise RecipeError(
                f"{source.place}: its statistics are of another model: {own.statistic} of {name} "
                f"{list(tensor.shape)} has shape {list(total.shape)}, expected {list(shape)}; calibrate this model"
            )
        return SumFromData(total, count, own.elementwise)


def _by_layer(folder: Statistics, layers: Mapping[str, int | None]) -> dict[int | None, float]:
    """Return the sensitivity of each layer of a model; None stands for all that is in no layer."""
    found: dict[int | None, float] = {}
    for name, layer in layers.items():
        own = folder.sensitivity(name) if folder.has("sensitivity", name) else 0.0
        found[layer] = found.get(layer, 0.0) + own
    return found


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
    own, of_base = method.data_statistics(), method.data_statistics(of_base=True)
    sources = method.data_sources(bases, inputs.models)
    for source in (*bases, *inputs.models):
        if source.statistics is not None and (not own or source not in sources):
            of = ("of the base" if source in bases else "of this model") if own else "from data"
            raise RecipeError(f"{source.place} statistics: {method.name} uses no statistics {of}; leave the key out")
        if source.base_statistics is not None and (not of_base or source in bases):
            raise RecipeError(
                f"{source.place} base_statistics: {method.name} uses no statistics of the base on this model's data; leave "
                "the key out"
            )
    named = any(source.statistics is not None for source in sources)
    if not method.from_data and not any(named or not each.optional for each in method.numbers.values()):
        return None
    folders = [_open(method, source, own) for source in sources] if own else []
    base_folders = [_open_of_base(method, inputs, source, of_base) for source in sources] if of_base else []
    return DataOfModels(method.from_data, method.numbers, sources, folders, base_folders, inputs.base)


def _open(method: MergeMethod, source: Source, names: Sequence[str]) -> Statistics:
    if source.statistics is None:
        raise RecipeError(_missing(method, source, ", ".join(names)))
    folder = open_statistics(source.statistics)
    if folder.inputs != method.data_inputs:
        raise RecipeError(
            f"{source.place}: its statistics are of {_INPUTS.get(folder.inputs, folder.inputs)}; {method.name} needs "
            f"those of {_INPUTS[method.data_inputs]}"
        )
    for name in names:
        folder.require(name)
    return folder


def _open_of_base(method: MergeMethod, inputs: Inputs, source: Source, names: Sequence[str]) -> Statistics:
    wanted = ", ".join(names)
    if source.base_statistics is None:
        base = "BASE" if inputs.base is None else inputs.base.model
        raise RecipeError(
            f"{source.place}: {method.name} needs statistics of the base on this model's data ({wanted}); write them with "
            f"merganser calibrate {base} --data FILE --statistics {wanted} --out FOLDER, and give the folder as "
            "'base_statistics'"
        )
    folder = open_statistics(source.base_statistics)
    for name in names:
        folder.require(name)
    return folder


def _missing(method: MergeMethod, source: Source, wanted: str) -> str:
    """Return what the user can do where a recipe names no statistics of a model."""
    of = "the base" if method.data_of == "base" else "this model"
    needed = f"{source.place}: {method.name} needs statistics of {of} from data ({wanted})"
    if method.data_inputs != "own":
        return f"{needed}, measured within the merge; name a text of its field as 'data'"
    listed = ", with the base listed among the models" if method.data_of == "base" else ""
    return (
        f"{needed}; name a text file as 'data'{listed}, or write them with merganser calibrate {source.model} --data FILE "
        f"--statistics {wanted} --out FOLDER, and give the folder as 'statistics'"
    )


def with_data(tensor: PlannedTensor, data: DataOfModels | None) -> PlannedTensor:
    """Return a planned tensor with the statistics from data that its method takes of it.

    Raises:
        RecipeError: As `DataOfModels.of`.
    """
    if data is None or tensor.copy or not tensor.method.from_data:
        return tensor
    sums, turned = data.of(tensor.name, tensor.base, tensor.method.data_sources(tensor.inputs[:1], tensor.models))
    return replace(tensor, data=sums, turned=turned and tensor.method.scope == "matrix")


def check_weights(data: Sequence[DataOfModels | None], cache_dir: Path | None, stream: bool = False) -> None:
    """Check that statistics are of the weights that are merged, by a sample of these.

    Args:
        data: The statistics of each slice.
        cache_dir: Folder for models from the Hub.
        stream: Whether weights of models from the Hub are read by ranges.

    Raises:
        RecipeError: Some are of other weights.
    """
    samples: dict[ModelReference, str] = {}
    opened = partial(open_reference, cache_dir=cache_dir, stream=stream)
    for own in data:
        if own is None:
            continue
        for source, folder in zip(own.sources, own.folders, strict=bool(own.folders)):
            _check_weights(f"{source.place} statistics", folder, source.model, samples, opened)
        for source, folder in zip(own.sources, own.base_folders, strict=bool(own.base_folders)):
            if own.base is not None:
                _check_weights(f"{source.place} base_statistics", folder, own.base.model, samples, opened)


def _check_weights(
    key: str,
    folder: Statistics,
    model: ModelReference,
    samples: dict[ModelReference, str],
    opened: Callable[[str], Checkpoint],
) -> None:
    """Check the statistics that one key names; `samples` are those of models that were opened before."""
    found = folder.about["model"]
    if model not in samples:
        # opened as calibrate does, since planning may rename tensors or leave some out
        samples[model] = weights_sample(opened(str(model)))
    # statistics of an earlier version have no sample
    if found.get("sample", samples[model]) != samples[model]:
        raise RecipeError(
            f"{key}: {folder.path} is of other weights than {model}: of {found['reference']}, or of this model as it was "
            "then. Calibrate this model, or write 'check_statistics: false' at the top of the recipe to take them as they "
            "are"
        )
