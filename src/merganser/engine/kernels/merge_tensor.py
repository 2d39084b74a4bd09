"""Merge one tensor in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ...errors import NonFiniteError
from ...method import Location, MergeMethod
from ...method.method import fill
from ...ops.random import keys
from ..fusion.machine import why_not
from .assignment import treat
from .blocks import BLOCK, Inputs, TensorRun, working_shape
from .data import Data, PerModel
from .kernels import Kernels
from .values import Values

_OUTSIDE = Location()


def merge_tensor(
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
    block: int | None = None,
    fused: bool = False,
    allow_nonfinite: bool = False,
    data: Mapping[str, Sequence[Any]] | None = None,
) -> Tensor:
    """Merge one tensor in memory.

    Args:
        method: The merge method.
        base: The base tensor, or None if the method takes none.
        models: The other tensors, of the same shape, on the same device.
        parameters: Values by their names in recipes; a single value of a per-model parameter is used for all models.
        name: Name of the tensor: part of the key of random draws.
        role: Role of the tensor ("attention", "embedding", "expert", ...), for methods that work on matrices or rows;
            by default a tensor of two dimensions is a matrix, and the first dimension counts rows.
        location: Location of the tensor, for methods that depend on the layer; by default before the layers.
        seed: Seed of random draws.
        dtype: Dtype of the result; by default the promoted dtype of the inputs.
        compute: Dtype of the arithmetic; by default float32, or float64 if an input or `dtype` is.
        block: Elements of a block, at most; by default as for checkpoints.
        fused: Fuse operations, as merges do, if this process can; by default they run in torch, one by one.
        allow_nonfinite: Merge NaN and infinity instead of raising an error.
        data: Statistics from data that the method takes: by name a tensor per model, as `FromData` says, for packed
            experts with a leading dimension; and numbers from data. Without them, the tensor is merged like one that has
            none.

    Returns:
        The merged tensor, in the shape of the inputs.

    Raises:
        ParameterError: A parameter is unknown, missing, out of range or of the wrong count.
        NonFiniteError: An input holds NaN or infinity, or the result overflows `dtype`.
        ValueError: Shapes or devices differ, or the number of models does not fit the method.
    """
    _check_inputs(method, base, models)
    dtypes = [tensor.dtype for tensor in (*models, *([] if base is None else [base]))]
    dtype = dtype or reduce(torch.promote_types, dtypes)
    compute = compute or (torch.float64 if torch.float64 in (dtype, *dtypes) else torch.float32)
    shape, device = tuple(models[0].shape), models[0].device
    filled = fill(method, parameters or {}, len(models))
    location = replace(location, role=role or location.role)
    numbers = {key: own for key, own in (data or {}).items() if key in method.numbers}
    treatment = treat(
        method,
        filled,
        name=name,
        shape=shape,
        role=role,
        location=location,
        n_models=len(models),
        based=base is not None,
        numbers=numbers,
    )
    method, values = treatment.method, Values.of(treatment.method, treatment.parameters, treatment.located)
    base, models = treatment.inputs(base, models)
    inputs = [*models] if base is None else [base, *models]
    fused = fused and method.fuse and (device.type != "cpu" or why_not() is None)
    kernels = Kernels(method, values.static, compute, dtype, device, fused, not allow_nonfinite)
    worked = working_shape(shape, method.scope, role)
    run = TensorRun(kernels, values, worked, keys(seed, name, len(models)), block or BLOCK, name=name)
    if not run.ranges:
        return torch.empty(shape, dtype=dtype, device=device)
    result = torch.empty(math.prod(shape), dtype=dtype, device=device)
    complaint = f"{name}: an input or the result is not finite ({method.name}, {dtype})"
    handed = {key: own for key, own in (data or {}).items() if key in method.from_data}
    _run_on(run, [tensor.reshape(-1) for tensor in inputs], base is not None, result, complaint, handed)
    return result.view(shape)


def _run_on(
    run: TensorRun, inputs: Sequence[Tensor], with_base: bool, result: Tensor, complaint: str, data: Data
) -> None:
    """Measure, solve and combine flat inputs."""

    def read(start: int, end: int) -> Inputs:
        parts = [tensor[start:end] for tensor in inputs]
        return (parts[0], parts[1:]) if with_base else (None, parts)

    def refuse(_: Inputs) -> None:
        raise NonFiniteError(complaint)

    def own(start: int, end: int) -> Data:
        return _of_block(data, run, start, end)

    known = run.solve_statistics(read, refuse, own)
    for start, end in run.ranges:
        found = read(start, end)
        result[start:end], finite = run.combine(known, (start, end), *found, own(start, end))
        if not finite:
            refuse(found)


def _of_block(data: Data, run: TensorRun, start: int, end: int) -> Data:
    """Return the statistics from data of a block, or of the matrix that it is, in the compute dtype."""
    method, compute = run.kernels.method, run.kernels.compute
    packed = method.scope == "matrix" and len(run.shape) == 3

    def part(tensor: Tensor, name: str) -> Tensor:
        if method.from_data[name].elementwise:
            return tensor.reshape(-1)[start:end].reshape(run.own_shape((start, end)))
        return tensor[run.matrix(start)] if packed else tensor

    def own(tensors: Sequence[Tensor], name: str) -> PerModel:
        return PerModel(len(tensors), lambda k: part(tensors[k], name).to(compute))

    return {name: own(tensors, name) for name, tensors in data.items()}


def _check_inputs(method: MergeMethod, base: Tensor | None, models: Sequence[Tensor]) -> None:
    shapes = {tuple(tensor.shape) for tensor in ([*models] if base is None else [base, *models])}
    if len(shapes) != 1:
        raise ValueError(f"{method.name}: tensors of one shape are needed, got {sorted(shapes)}")
    if len(models) < method.min_models or (method.max_models is not None and len(models) > method.max_models):
        raise ValueError(f"{method.name} takes {method.models_text()}, got {len(models)} models")
    if method.base == ("required" if base is None else "unused"):
        raise ValueError(f"{method.name} takes {method.models_text()}, got {'no' if base is None else 'a'} base")
