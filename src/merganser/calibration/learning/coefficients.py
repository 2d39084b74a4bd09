"""The coefficients of all tensors: which share them, the weights that they make, and their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Reader, TensorInfo
from ...engine.kernels.values import Values
from ...engine.plan.plan import Plan
from ...engine.plan.tensor import PlannedTensor
from ...method import Learning, MergeMethod, takes
from ..within.weights import MergedTensors
from .columns import coefficient_shape

__all__ = ["Coefficients", "LearntTensors", "chosen", "settings_of"]


def chosen(plan: Plan) -> list[PlannedTensor]:
    """Return the tensors that have coefficients: those that the plan's own method merges."""
    return [own for own in plan.tensors if own.method is plan.method and not own.copy and own.shape]


def settings_of(method: MergeMethod, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters by the names of arguments, as functions of the method take them."""
    values = Values.of(method, parameters)
    return {**values.static, **values.numbers}


class Coefficients:
    """The coefficients.

    Args:
        method: The method; its function makes weights of coefficients.
        learning: How they are learnt.
        tensors: The tensors that have coefficients; all have the same parameters.
        axes: For matrices whose columns have coefficients of their own, the axis that counts these.
        reader: Reads base and models.

    Attributes:
        values: The coefficients by group, shape [models, ...], float32, which broadcast against each tensor of the group. A
            group is a tensor, a layer, or the model.
    """

    def __init__(
        self,
        method: MergeMethod,
        learning: Learning,
        tensors: Sequence[PlannedTensor],
        axes: Mapping[str, int],
        reader: Reader,
    ) -> None:
        self._method = method
        self._reader = reader
        self._tensors = {own.name: own for own in tensors}
        self._settings = settings_of(method, tensors[0].parameters)
        self._argument = next(iter(method.from_data))
        self._losses = len(tensors[0].models) if learning.by_model else 1
        over = learning.granularity(tensors[0].parameters)
        self._groups = {own.name: _group(own, over) for own in tensors}
        self.values: dict[str, Tensor] = {}
        for own in tensors:
            count = len(own.models)
            given = {**self._settings, "count": count}
            start = float(learning.start(**{name: given[name] for name in takes(learning.start)}))
            axis = axes.get(own.name) if over == "column" else None
            shape = coefficient_shape(own.shape, axis, learning.chunks(own.parameters))
            self.values.setdefault(self._groups[own.name], torch.full((count, *shape), start))
        self._gradients = self._zeros()

    def _zeros(self) -> dict[str, Tensor]:
        return {group: own.new_zeros(self._losses, *own.shape) for group, own in self.values.items()}

    def __contains__(self, name: object) -> bool:
        """Return whether a tensor has coefficients."""
        return name in self._tensors

    def of(self, name: str) -> list[Tensor]:
        """Return the coefficients of a tensor: one tensor per model."""
        return list(self.values[self._groups[name]].detach())

    def weight(self, name: str) -> Tensor:
        """Return the merged tensor, float32, not rounded to the dtype of the output."""
        with torch.no_grad():
            return self._merge(name, self.of(name))

    def add_gradient(self, name: str, gradient: Tensor, loss: int) -> None:
        """Add the gradients of a tensor's coefficients, by the chain rule, given that of a loss with respect to the tensor.

        Args:
            name: Its name.
            gradient: In the shape of the tensor.
            loss: Which loss.
        """
        with torch.enable_grad():
            coefficients = [own.clone().requires_grad_() for own in self.of(name)]
            found = torch.autograd.grad(self._merge(name, coefficients), coefficients, gradient.float())
        self._gradients[self._groups[name]][loss] += torch.stack(found)

    def take_gradients(self) -> dict[str, Tensor]:
        """Return the gradients that were added, by group, shape [losses, models, ...], and start again from zero."""
        found, self._gradients = self._gradients, self._zeros()
        return found

    def _merge(self, name: str, coefficients: Sequence[Tensor]) -> Tensor:
        planned = self._tensors[name]
        given: dict[str, Any] = {**self._settings, self._argument: coefficients}
        if planned.base is not None:
            given["base"] = self._reader.tensor(planned.base).float()
        given["models"] = [self._reader.tensor(model).float() for model in planned.models]
        return self._method.combine(**{name: given[name] for name in takes(self._method.combine)})


def _group(planned: PlannedTensor, over: str) -> str:
    if over == "model":
        return "the model"
    if over == "layer":
        return "outside the layers" if planned.layer is None else f"layer {planned.layer}"
    return planned.name


class LearntTensors:
    """The tensors of the merged model, as its skeleton reads them: float32 where they have coefficients.

    Args:
        plan: The merge, planned without its statistics from data.
        coefficients: The coefficients.
    """

    def __init__(self, plan: Plan, coefficients: Coefficients) -> None:
        self._coefficients = coefficients
        self._others = MergedTensors(plan)

    def prepare(self, names: Iterable[str]) -> None:
        """Merge those of some tensors that have no coefficients, and forget those before."""
        others = [name for name in names if name not in self._coefficients]
        if others:
            self._others.make(others)

    def named(self, name: str) -> Tensor:
        """Return one of the tensors that were prepared last."""
        return self._coefficients.weight(name) if name in self._coefficients else self._others.made[name]

    def tensor(self, info: TensorInfo, /) -> Tensor:
        """Return the tensor of this description."""
        return self.named(info.name)
