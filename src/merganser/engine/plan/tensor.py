"""One tensor of the output: its inputs, its method, and its location in the files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...checkpoint import DType, TensorInfo
from ...checkpoint.float8 import FLOAT8, Float8
from ...checkpoint.formats.gguf.encode import GgufEncoding
from ...method import MergeMethod
from ..kernels.blocks import BLOCK, block_step, working_shape


@dataclass(frozen=True, slots=True)
class SumFromData:
    """A sum over tokens or sequences; the method gets the mean over tokens.

    Args:
        sum: The sum.
        count: The number of tokens in it; 0-d, or one for each expert.
        elementwise: Whether it has the shape of the tensor.
        summed: Whether it is a sum; otherwise the method gets it as it is.
    """

    sum: TensorInfo
    count: TensorInfo
    elementwise: bool = False
    summed: bool = True


@dataclass(frozen=True, slots=True)
class Quantised:
    """How a tensor is stored as float8, and where its scales are.

    Args:
        scheme: The tiles.
        shard: Index of the shard that holds the scales.
        offset: Their first byte in that shard.
    """

    scheme: Float8
    shard: int = 0
    offset: int = 0


@dataclass(slots=True)
class PlannedTensor:
    """How one tensor of the output is merged.

    Not frozen, since there may be 100,000: making a frozen one takes twice as long, and so would a copy to fill in its
    place. Only `place` in `part.py` changes one.

    Args:
        name: Name in the output.
        dtype: Dtype in the output; of a quantised tensor, in the output of the same merge without `quantize`.
        compute_dtype: Dtype of the arithmetic: float32, or float64 if the recipe's dtype, an input or the output is.
        shape: Shape.
        copy: True for integers: all inputs must be equal, and are copied.
        method: Merges it: the plan's method, or the one for tensors that the plan's method leaves out.
        base: The base's tensor, if the method takes one.
        models: The other inputs, in the order of the recipe.
        parameters: Resolved values of its method, by their names in recipes.
        located: Numbers that the method derives from the tensor's location.
        layer: Layer in the output, if in a layer.
        role: Role in the model ("attention", "norm", ...).
        shard: Index of the shard that holds it.
        offset: First byte in that shard.
        nbytes: Size in the output, bytes.
        data: Statistics from data for its method, by name, one per model; empty if there are none for it.
        turned: Whether its matrices are stored [inputs, outputs], known from statistics from data.
        block_limit: Most elements per block: the plan's, or a multiple of what must be quantised together.
        quantised: How it is stored as float8; None if it is not.
        gguf: How it is stored in a GGUF file; None if it is not.
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
    located: Mapping[str, float | Sequence[float]]
    layer: int | None
    role: str
    shard: int
    offset: int
    nbytes: int
    data: Mapping[str, tuple[SumFromData, ...]] = field(default_factory=dict)
    turned: bool = False
    block_limit: int = BLOCK
    quantised: Quantised | None = None
    gguf: GgufEncoding | None = None
    size: int = field(init=False)
    """Number of elements."""

    def __post_init__(self) -> None:
        """Count the elements once, as `size` is used often."""
        self.size = math.prod(self.shape)

    @property
    def working_shape(self) -> tuple[int, ...]:
        """Shape in which its kernels see it."""
        return working_shape(self.shape, self.method.scope, self.role)

    @property
    def block(self) -> int:
        """Elements per block; the last block may have fewer."""
        return block_step(self.working_shape, self.method.scope, self.block_limit)

    @property
    def in_one_block(self) -> bool:
        """Whether it has no more than one block."""
        # found without the shape for most tensors, as this is asked of every one
        return (self.size <= self.block_limit and self.method.scope != "matrix") or self.size <= self.block

    @property
    def stored_dtype(self) -> DType:
        """Dtype of its elements in a safetensors file."""
        return self.dtype if self.quantised is None else FLOAT8

    @property
    def stored_as(self) -> str:
        """Name of its dtype or type in the file."""
        return self.stored_dtype.name if self.gguf is None else self.gguf.type.name

    @property
    def result_dtype(self) -> DType:
        """Dtype to which the kernels round: that of the file, or of the arithmetic if values are quantised after it."""
        if self.gguf is not None:
            return self.gguf.plain or self.compute_dtype
        return self.dtype if self.quantised is None else self.compute_dtype

    @property
    def is_encoded(self) -> bool:
        """Whether the merged values are not stored as they are; then it is merged alone."""
        return self.quantised is not None or self.gguf is not None

    def span(self, start: int, end: int) -> tuple[int, int, int]:
        """Return where a range of elements is stored: shard, first byte, number of bytes."""
        if self.gguf is not None:
            first = self.gguf.nbytes(start)
            return self.shard, self.offset + first, self.gguf.nbytes(end) - first
        size = self.stored_dtype.itemsize
        return self.shard, self.offset + start * size, (end - start) * size

    @property
    def scale_name(self) -> str:
        """Name of the scales of a quantised tensor."""
        return self.name + (self.quantised.scheme.suffix if self.quantised else "")

    @property
    def described(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        """Names, dtypes and shapes of what the file holds for it: the tensor, and the scales of a quantised one."""
        found = [(self.name, self.stored_dtype, self.shape)]
        if self.quantised is not None:
            scheme = self.quantised.scheme
            found.append((self.scale_name, scheme.scale, scheme.scale_shape(self.shape)))
        return found

    def scale_span(self, start: int, end: int) -> tuple[int, int, int]:
        """Return where the scales of a range of elements of whole tiles are: shard, first byte, number of bytes."""
        assert self.quantised is not None
        scheme, columns = self.quantised.scheme, self.shape[1]
        height, row = scheme.tile[0], scheme.scale_shape(self.shape)[1] * scheme.scale.itemsize
        first, last = start // columns // height, -(-(end // columns) // height)
        return self.quantised.shard, self.quantised.offset + first * row, (last - first) * row

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """The base, if any, and the models."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def nbytes_read(self) -> int:
        """Size of the inputs in their files, bytes."""
        stored = sum([tensor.nbytes_stored if tensor.stored else tensor.nbytes for tensor in self.inputs])
        return stored + (sum(own.sum.nbytes for each in self.data.values() for own in each) if self.data else 0)

    @property
    def passes(self) -> int:
        """Number of passes over the inputs: one per measuring round, and one to combine."""
        if self.copy:
            return 1
        statistics = self.method.statistics.values()
        return 1 + sum(len(statistic.rounds) for statistic in statistics if statistic.wanted(self.parameters))

    @property
    def together(self) -> Literal["joined", "stacked"] | None:
        """How it can be merged in one call with other small tensors, as in `MergeMethod.together`."""
        return None if self.copy else self.method.together(self.parameters)

    @property
    def over_model(self) -> bool:
        """Whether one of its statistics is measured over the whole model."""
        return not self.copy and any(
            statistic.wanted(self.parameters) and statistic.where(self.parameters) == "model"
            for statistic in self.method.statistics.values()
        )


def each_once(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """Return one tensor for every distinct set of parameters."""
    return list({id(tensor.parameters): tensor for tensor in tensors}.values())


def holds(tensor: PlannedTensor, task: int) -> bool:
    """Return whether a task's checkpoint stores a tensor under this name; a tied head is read from the embedding."""
    return tensor.models[task].name == tensor.name
