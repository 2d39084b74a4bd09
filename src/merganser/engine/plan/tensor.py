"""One tensor of the output: what it is made from, and how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...checkpoint import DType, TensorInfo
from ...method import MergeMethod
from ..kernels.blocks import block_step, working_shape


@dataclass(frozen=True, slots=True)
class SumFromData:
    """A sum over tokens that a method is handed as a mean.

    Args:
        sum: The sum.
        count: The number of tokens in it.
    """

    sum: TensorInfo
    count: TensorInfo


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """How one tensor of the output is made.

    Args:
        name: Name in the output.
        dtype: Dtype in the output.
        compute_dtype: Dtype of the arithmetic: float32, or float64 where the recipe's dtype, an input or the output is.
        shape: Shape.
        copy: True for integers: all inputs must be equal, and are copied.
        method: Merges it: the plan's method, or another one for what that does not treat.
        base: The base's tensor, where the method takes one.
        models: The other inputs, in the order of the recipe.
        parameters: Resolved values of its method, by their names in recipes.
        located: Numbers that the method takes from where the tensor is.
        layer: Layer in the output, if in a layer.
        role: What the tensor does ("attention", "norm", ...).
        shard: Index of the shard that holds it.
        offset: First byte in that shard.
        nbytes: Size in the output, bytes.
        data: Statistics from data that its method is handed, by name, one per model; empty where there are none of it.
        turned: Whether its matrices are stored [inputs, outputs], as statistics from data tell.
    """

    name: str
    dtype: DType
    compute_dtype: DType
    shape: tuple[int, ...]
    copy: bool
    method: MergeMethod
    base: TensorInfo | None
    models: tuple[TensorInfo, ...]
    parameters: Mapping[str, Any]
    located: Mapping[str, float]
    layer: int | None
    role: str
    shard: int
    offset: int
    nbytes: int
    data: Mapping[str, tuple[SumFromData, ...]] = field(default_factory=dict)
    turned: bool = False
    size: int = field(init=False)
    """Number of elements."""

    def __post_init__(self) -> None:
        """Count the elements, once: many ask for them."""
        object.__setattr__(self, "size", math.prod(self.shape))

    @property
    def working_shape(self) -> tuple[int, ...]:
        """Shape as which it is worked on."""
        return working_shape(self.shape, self.method.scope, self.role)

    @property
    def block(self) -> int:
        """Number of elements of each of its blocks but the last."""
        return block_step(self.working_shape, self.method.scope)

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """The base, if any, and the models."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def nbytes_read(self) -> int:
        """Size of the inputs, bytes."""
        from_data = (own.sum.nbytes for each in self.data.values() for own in each)
        return sum(tensor.nbytes for tensor in self.inputs) + sum(from_data)

    @property
    def passes(self) -> int:
        """How often the inputs are looked at: once per measuring round, once to combine."""
        if self.copy:
            return 1
        statistics = self.method.statistics.values()
        return 1 + sum(len(statistic.rounds) for statistic in statistics if statistic.wanted(self.parameters))

    @property
    def together(self) -> Literal["joined", "stacked"] | None:
        """How it is merged at once with others, where it is small, as in `MergeMethod.together`."""
        return None if self.copy else self.method.together(self.parameters)

    @property
    def over_model(self) -> bool:
        """Whether it takes part in something that is measured over the whole model."""
        return not self.copy and any(
            statistic.wanted(self.parameters) and statistic.where(self.parameters) == "model"
            for statistic in self.method.statistics.values()
        )


def each_once(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """Return one tensor for every distinct set of parameters."""
    return list({id(tensor.parameters): tensor for tensor in tensors}.values())


def holds(tensor: PlannedTensor, task: int) -> bool:
    """Say whether a task's own checkpoint holds a tensor; a tied head is read from the embedding."""
    return tensor.models[task].name == tensor.name
