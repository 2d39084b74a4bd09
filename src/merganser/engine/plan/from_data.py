"""Match statistics from calibration data to the tensors that are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...checkpoint import TensorInfo
from ...errors import RecipeError
from ...method import FromData, MergeMethod, NumbersFromData
from ...recipe import Inputs, Source
from ...statistics import COUNT, PREDICTIONS, Statistics, open_statistics
from .tensor import SumFromData

__all__ = ["DataOfModels", "open_data"]


@dataclass(frozen=True)
class DataOfModels:
    """The statistics from data of the models that a recipe merges.

    Args:
        wanted: The statistics that the method takes, by argument name.
        numbers: The numbers that it takes, by argument name.
        sources: The models, as the recipe lists them.
        folders: The statistics of each model, and those of the base on the data of each model, in that order; empty where
            the method takes none of them.
    """

    wanted: Mapping[str, FromData]
    numbers: Mapping[str, NumbersFromData]
    sources: Sequence[Source]
    folders: Mapping[str, Sequence[Statistics]]

    def of(
        self, base: TensorInfo | None, models: Sequence[TensorInfo]
    ) -> tuple[dict[str, tuple[SumFromData, ...]], bool]:
        """Return the statistics of one merged tensor, and whether its matrices are stored [inputs, outputs].

        Args:
            base: The tensor in the base.
            models: The tensor in each model.

        Returns:
            One sum per model, by argument name, without the statistics that no model has of this tensor.

        Raises:
            RecipeError: Only some models have a statistic of it, or a shape does not fit the tensor.
        """
        found: dict[str, tuple[SumFromData, ...]] = {}
        turned = False
        for name, own in self.wanted.items():
            tensors = models if own.of == "model" or base is None else [base] * len(models)
            folders = self.folders[own.of]
            has = [folder.has(own.statistic, tensor.name) for folder, tensor in zip(folders, tensors, strict=True)]
            if not any(has):
                continue
            for source, tensor, given in zip(self.sources, tensors, has, strict=True):
                if not given:
                    raise RecipeError(
                        f"{source.place}: its statistics have no entry for {tensor.name}, other models' do; calibrate all "
                        "models with the same version of merganser"
                    )
            axes = self._axes(own, tensors)
            turned = turned or axes == {len(models[0].shape) - 2}
            found[name] = tuple(self._sum(own, k, tensors[k], turned=turned) for k in range(len(tensors)))
        return found, turned

    def numbers_of(self, layers: Sequence[Mapping[str, int | None]]) -> dict[str, tuple[Any, ...]]:
        """Return the numbers that the method takes, by argument name: one entry per model.

        Args:
            layers: For each model, the layers of its tensors in the output, by name; None outside layers.
        """
        found: dict[str, tuple[Any, ...]] = {}
        for name, own in self.numbers.items():
            folders = self.folders["model"]
            if own.statistic == "loss":
                found[name] = tuple(folder.loss for folder in folders)
            else:
                found[name] = tuple(map(_by_layer, folders, layers))
        return found

    def _axes(self, own: FromData, tensors: Sequence[TensorInfo]) -> set[int]:
        """Return the axis along which a matrix takes its inputs; empty for a tensor that is no matrix."""
        axes: set[int] = set()
        for folder, source, tensor in zip(self.folders[own.of], self.sources, tensors, strict=True):
            axes |= {folder.tensors[tensor.name].axis} if tensor.name in folder.tensors else set()
            if len(axes) > 1:
                raise RecipeError(
                    f"{source.place}: its statistics count inputs along another axis of {tensor.name}, other models' do; "
                    "calibrate all models with the same version of merganser"
                )
        return axes

    def _sum(self, own: FromData, model: int, tensor: TensorInfo, *, turned: bool) -> SumFromData:
        folder = self.folders[own.of][model]
        total = folder.info(own.statistic, tensor.name)
        count = folder.info(COUNT, tensor.name) if own.of_inputs else folder.of_model(PREDICTIONS)
        lead, rest = tensor.shape[:-2], tensor.shape[-2:]
        shape = tensor.shape if own.elementwise else (*lead, *own.shape(rest[::-1] if turned else rest))
        if total.shape != shape or (own.of_inputs and count.shape != lead):
            raise RecipeError(
                f"{self.sources[model].place}: its statistics are of another model: {own.statistic} of {tensor.name} "
                f"{list(tensor.shape)} has shape {list(total.shape)}, expected {list(shape)}"
            )
        return SumFromData(total, count, own.elementwise)


def _by_layer(folder: Statistics, layers: Mapping[str, int | None]) -> dict[int | None, float]:
    """Return the sensitivity of each layer of a model; None stands for all that is in no layer."""
    found: dict[int | None, float] = {}
    for name, layer in layers.items():
        own = folder.sensitivity(name) if folder.has("sensitivity", name) else 0.0
        found[layer] = found.get(layer, 0.0) + own
    return found


_KEYS = {"model": "statistics", "base": "base_statistics"}


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
    wanted: dict[str, list[str]] = {
        of: [own.statistic for own in method.from_data.values() if own.of == of] for of in _KEYS
    }
    wanted["model"] += [own.statistic for own in method.numbers.values()]
    for source in inputs.models if inputs.base is None else [inputs.base, *inputs.models]:
        for of, key in _KEYS.items():
            if getattr(source, key) is not None and (source is inputs.base or not wanted[of]):
                what = "from data" if of == "model" else "of the base from data"
                what = "of the base" if source is inputs.base and wanted["model"] else what
                raise RecipeError(f"{source.place} {key}: {method.name} uses no statistics {what}; leave the key out")
    given = any(source.statistics is not None for source in inputs.models)
    if not method.from_data and not any(given or not own.optional for own in method.numbers.values()):
        return None
    folders: dict[str, list[Statistics]] = {of: [] for of in _KEYS}
    for source in inputs.models:
        for of, names in wanted.items():
            if names:
                folders[of].append(_open(method, inputs, source, of, list(dict.fromkeys(names))))
    return DataOfModels(method.from_data, method.numbers, inputs.models, folders)


def _open(method: MergeMethod, inputs: Inputs, source: Source, of: str, names: Sequence[str]) -> Statistics:
    folder, wanted = getattr(source, _KEYS[of]), ", ".join(names)
    if folder is None:
        model = source.model if of == "model" or inputs.base is None else inputs.base.model
        what = "statistics of this model from data" if of == "model" else "statistics of the base on this model's data"
        raise RecipeError(
            f"{source.place}: {method.name} needs {what} ({wanted}); write them with merganser calibrate {model} "
            f"--data FILE --statistics {wanted} --out FOLDER, and give the folder as {_KEYS[of]!r}"
        )
    found = open_statistics(folder)
    for name in names:
        found.require(name)
    return found
