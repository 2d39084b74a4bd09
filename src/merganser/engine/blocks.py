"""Run a merge method over the blocks of one tensor: the one place that knows the order of things.

Blocks are the unit of all arithmetic. Their borders depend on the tensor's shape and the method's scope alone, so
sums of measurements, and with them every byte, are the same for any memory limit, chunk size or number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..method import Location, MergeMethod
from ..ops.random import keys
from .kernels import Block, Kernels, Values
from .treatment import treat

BLOCK = 1 << 19
"""Elements of a block, at most, on a CPU (a row or a whole tensor may be larger where the method needs it)."""

_OUTSIDE = Location()


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape as rows and columns: a row is all weights of one output unit; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def working_shape(shape: Sequence[int], scope: str, role: str | None) -> tuple[int, ...]:
    """Return the shape as which a tensor is worked on.

    A row is all weights of one output unit, also of packed experts [experts, rows, columns]: where rows are wanted, these
    are one matrix, an expert below the other.

    Args:
        shape: Shape of the tensor.
        scope: "element", "row", "tensor" or "matrix", as in the method.
        role: What the tensor does; None: not known.
    """
    if scope == "row" and role == "expert" and len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return tuple(shape)


def block_ranges(shape: Sequence[int], scope: str, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Cut a tensor into blocks, on borders between rows where rows are not longer than a block.

    Args:
        shape: Shape as which the tensor is worked on.
        scope: "element", "row", "tensor" or "matrix", as in the method.
        block: Elements of a block, at most; a row, tensor or matrix that the scope needs whole may be larger.

    Yields:
        First element and end of each block.
    """
    size = math.prod(shape)
    step = block_step(shape, scope, block)
    for start in range(0, size, step):
        yield start, min(start + step, size)


def block_step(shape: Sequence[int], scope: str, block: int = BLOCK) -> int:
    """Return the number of elements of every block of a tensor but the last."""
    columns = matrix_shape(shape)[1]
    step = max(block // max(columns, 1), 1) * columns
    if scope == "tensor":
        step = math.prod(shape)
    elif scope == "matrix":
        step = math.prod(shape[-2:])
    elif scope == "element" and columns > block:
        step = block
    return max(step, 1)


def block_shape(shape: Sequence[int], scope: str, size: int) -> tuple[int, ...]:
    """Return the shape in which a block of `size` elements is handed to the method."""
    if scope == "tensor":
        return tuple(shape)
    if scope == "matrix":
        return tuple(shape[-2:])
    if scope == "row":
        columns = matrix_shape(shape)[1]
        return (size // columns if columns else 0, columns)
    return (size,)


def merge_tensors(
    method: MergeMethod,
    base: Tensor | None,
    models: Sequence[Tensor],
    parameters: Mapping[str, Any] | None = None,
    *,
    name: str = "tensor",
    role: str | None = None,
    location: Location = _OUTSIDE,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    compute: torch.dtype | None = None,
    block: int = BLOCK,
    compiled: bool = False,
    allow_nonfinite: bool = False,
) -> Tensor:
    """Merge one tensor in memory.

    Args:
        method: The merge method.
        base: The base tensor, or None where the method takes none.
        models: The other tensors, of the same shape, on the same device.
        parameters: Values by the names that recipes use; a single value of a per-model parameter counts for all.
        name: Name of the tensor: part of the key of random draws.
        role: What the tensor does ("attention", "embedding", "expert", ...), for methods that treat matrices or rows; by
            default what has two dimensions is a matrix, and the first dimension counts rows.
        location: Where the tensor is, for methods that go by layers; by default before them.
        seed: Seed of random draws.
        dtype: Dtype of the result; by default what the inputs promote to.
        compute: Dtype of the arithmetic; by default float32, or float64 if an input or `dtype` is.
        block: Elements of a block, at most.
        compiled: Fuse with `torch.compile`.
        allow_nonfinite: Merge NaN and infinity instead of refusing them.

    Returns:
        The merged tensor, in the shape of the inputs.

    Raises:
        ParameterError: A parameter is unknown, missing, out of range or of the wrong count.
        NonFiniteError: An input holds NaN or infinity, or the result overflows `dtype`.
        ValueError: Shapes or devices differ, or the number of models does not suit the method.
    """
    _check_inputs(method, base, models)
    dtypes = [tensor.dtype for tensor in (*models, *([] if base is None else [base]))]
    dtype = dtype or reduce(torch.promote_types, dtypes)
    compute = compute or (torch.float64 if torch.float64 in (dtype, *dtypes) else torch.float32)
    shape, device = tuple(models[0].shape), models[0].device
    filled = fill(method, parameters or {}, len(models))
    location = replace(location, role=role or location.role)
    treatment = treat(method, filled, name=name, shape=shape, role=role, location=location, n_models=len(models))
    method, values = treatment.method, Values.of(treatment.method, treatment.parameters, treatment.located)
    base, models = treatment.inputs(base, models)
    inputs = [*models] if base is None else [base, *models]
    kernels = Kernels(method, values.static, compute, dtype, device, compiled and method.fuse, not allow_nonfinite)
    worked = working_shape(shape, method.scope, role)
    run = TensorRun(kernels, values, worked, keys(seed, name, len(models)), block)
    if not run.ranges:
        return torch.empty(shape, dtype=dtype, device=device)
    result = torch.empty(math.prod(shape), dtype=dtype, device=device)
    complaint = f"{name}: an input or the result is not finite ({method.name}, {dtype})"
    _run_on(run, [tensor.reshape(-1) for tensor in inputs], base is not None, result, complaint)
    return result.view(shape)


def _run_on(run: TensorRun, inputs: Sequence[Tensor], with_base: bool, result: Tensor, complaint: str) -> None:
    """Measure, solve and combine flat inputs."""

    def read(start: int, end: int) -> tuple[Tensor | None, list[Tensor]]:
        parts = [tensor[start:end] for tensor in inputs]
        return (parts[0], parts[1:]) if with_base else (None, parts)

    def checked(found: tuple[Tensor, bool]) -> tuple[Tensor, bool]:
        if not found[1]:
            raise NonFiniteError(complaint)
        return found

    known: dict[str, Tensor] = {}
    for name, statistic, _ in run.kernels.statistics:
        if run.at_once(name, known, *read(0, run.size)):
            continue
        for index in range(len(statistic.rounds)):
            total: Tensor | None = None
            for range_ in run.ranges:
                total = checked(run.measure(name, index, known, range_, *read(*range_), total))[0]
            assert total is not None
            run.solve(name, index, total, known, run.size)
    for start, end in run.ranges:
        result[start:end] = checked(run.combine(known, (start, end), *read(start, end)))[0]


def _check_inputs(method: MergeMethod, base: Tensor | None, models: Sequence[Tensor]) -> None:
    shapes = {tuple(tensor.shape) for tensor in ([*models] if base is None else [base, *models])}
    if len(shapes) != 1:
        raise ValueError(f"{method.name}: tensors of one shape are needed, got {sorted(shapes)}")
    if len(models) < method.min_models or (method.max_models is not None and len(models) > method.max_models):
        raise ValueError(f"{method.name} takes {method.models_text()}, got {len(models)} models")
    if method.base == ("required" if base is None else "unused"):
        raise ValueError(f"{method.name} takes {method.models_text()}, got {'no' if base is None else 'a'} base")


def fill(method: MergeMethod, parameters: Mapping[str, Any], n_models: int) -> dict[str, Any]:
    """Check parameters and complete them with defaults.

    Raises:
        ParameterError: A parameter is unknown, missing, out of range or of the wrong count.
    """
    from ..errors import ParameterError

    for given in parameters:
        method.parameter(given, method.name)
    filled: dict[str, Any] = {}
    for parameter in method.parameters.values():
        if parameter.name not in parameters and parameter.required:
            raise ParameterError(f"{method.name}: {parameter.name} is required: {parameter.help}")
        value = parameters.get(parameter.name, parameter.default)
        if not parameter.per_model:
            filled[parameter.name] = parameter.check(value, method.name)
            continue
        each = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * n_models
        if len(each) != n_models:
            raise ParameterError(
                f"{method.name}: {parameter.name} needs {n_models} values, one per model, got {len(each)}"
            )
        filled[parameter.name] = tuple(parameter.check(v, method.name) for v in each)
    complaint = method.validate(filled) if method.validate else None
    if complaint:
        raise ParameterError(f"{method.name}: {complaint}")
    return filled


class TensorRun:
    """The work on one output tensor: its blocks, parameters, random keys and statistics.

    Args:
        kernels: The method's kernels.
        values: The parameters of this tensor.
        shape: Shape as which the tensor is worked on.
        random_keys: From `ops.random.keys`.
        block: Elements of a block, at most.
    """

    def __init__(
        self, kernels: Kernels, values: Values, shape: tuple[int, ...], random_keys: Tensor, block: int = BLOCK
    ) -> None:
        self.kernels = kernels
        self.values = values
        self.shape = shape
        self.size = math.prod(shape)
        self.ranges = list(block_ranges(shape, kernels.method.scope, block))
        self._keys = random_keys.to(kernels.device)
        self._numbers = kernels.numbers(values)

    def measure(
        self,
        name: str,
        index: int,
        known: Mapping[str, Tensor],
        range_: tuple[int, int],
        base: Tensor | None,
        models: Sequence[Tensor],
        total: Tensor | None,
    ) -> tuple[Tensor, bool]:
        """Add the measurement of one block to the total of those before it; also say whether the block is finite."""
        block = self._block(known, range_, base, models)
        if name not in self.kernels.rows:
            total, finite = self.kernels.measure(name, index, block, total)
            return total, bool(finite)
        found, finite = self.kernels.measure(name, index, block, None)
        # so that those of several blocks add up
        total = found.new_zeros(matrix_shape(self.shape)[0], *found.shape[1:]) if total is None else total
        total[self._rows(range_)] = found
        return total, bool(finite)

    def solve(self, name: str, index: int, total: Tensor, known: dict[str, Tensor], size: int) -> None:
        """Solve a round and put its result into `known`: as `previous`, and under its name after the last round."""
        given = {key: value.cpu() for key, value in known.items()}
        given["size"] = torch.tensor(size, dtype=torch.float64)
        solved = self.kernels.solve(name, index, total, self.values, given)
        known["previous"] = solved
        if index == len(self.kernels.method.statistics[name].rounds) - 1:
            known[name] = solved
            del known["previous"]

    def at_once(self, name: str, known: dict[str, Tensor], base: Tensor | None, models: Sequence[Tensor]) -> bool:
        """Put a statistic into `known` without its rounds, if it can be found so; say whether it was."""
        if len(self.ranges) > 1 or self.kernels.method.statistics[name].at_once is None:
            return False
        given = {key: value.cpu() for key, value in known.items()}
        given["size"] = torch.tensor(self.size, dtype=torch.float64)
        block = self._block(known, self.ranges[0], base, models)
        known[name] = self.kernels.measure_at_once(name, block, self.values, given)
        return True

    @property
    def together(self) -> Literal["joined", "stacked"] | None:
        """How this tensor may be merged with others of the same kernels and parameters, as in `MergeMethod.together`."""
        # fused kernels are made for one tensor, and differ from others by rounding
        fits = len(self.ranges) == 1 and not (self.values.together == "stacked" and self.kernels.compiled)
        return self.values.together if fits else None

    def merge_several(
        self, runs: Sequence[TensorRun], base: Tensor | None, models: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Measure, solve and combine tensors of this one's size, kernels and parameters at once, stacked.

        Args:
            runs: The work on each of them, k in number.
            base: Their bases, if the method takes one, shape [k, size].
            models: The same of the models.

        Returns:
            The merged tensors, shape [k, size], and whether the inputs and the result of each are finite, shape [k].
        """
        kernels = self.kernels
        random = torch.stack([run._keys for run in runs]) if kernels.method.random else self._keys
        block = Block(
            base, models, {}, self._numbers, {}, random, torch.zeros((), dtype=torch.int64, device=kernels.device)
        )
        found: dict[str, Tensor] = {"size": torch.tensor(self.size, dtype=torch.float64)}
        for name, _, _ in kernels.statistics:
            found[name] = kernels.measure_at_once(name, block, self.values, found, several=True)
            block = replace(block, known={**block.known, name: kernels.to_device(found[name])})
        return kernels.combine_several(block)

    def combine(
        self, known: Mapping[str, Tensor], range_: tuple[int, int], base: Tensor | None, models: Sequence[Tensor]
    ) -> tuple[Tensor, bool]:
        """Merge one block, flat; also say whether the inputs and the result are finite."""
        merged, finite = self.kernels.combine(self._block(known, range_, base, models))
        return merged.reshape(-1), bool(finite)

    def _block(
        self, known: Mapping[str, Tensor], range_: tuple[int, int], base: Tensor | None, models: Sequence[Tensor]
    ) -> Block:
        start, end = range_
        shape = block_shape(self.shape, self.kernels.method.scope, end - start)
        over_rows = self.kernels.rows
        own = {name: known[name][self._rows(range_)] for name in known if name in over_rows}
        rows = {name: self.kernels.to_device(value) for name, value in own.items()}
        others = {name: self.kernels.to_device(value) for name, value in known.items() if name not in over_rows}
        offset = torch.tensor(start, dtype=torch.int64, device=self.kernels.device)
        return Block(
            None if base is None else base.reshape(shape),
            [model.reshape(shape) for model in models],
            rows,
            self._numbers,
            others,
            self._keys,
            offset,
        )

    def _rows(self, range_: tuple[int, int]) -> slice:
        """Return the rows of a block of whole ones."""
        columns = matrix_shape(self.shape)[1]
        return slice(range_[0] // columns, range_[1] // columns)
