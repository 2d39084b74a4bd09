"""Measure how long a method takes on blocks like those of a tensor, by running it on random numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...method import FromData, MergeMethod
from ...process import one_thread
from .blocks import BLOCK
from .data import PerModel
from .merge_tensor import merge_tensor

__all__ = ["measure_speed"]

_ENOUGH = 0.1
"""Seconds that one run on a matrix may take before no larger one is tried."""

_SMALLEST = 64
"""Longest side of the first matrix that is tried."""

_WEIGHT, _CHANGE = 0.02, 0.001
"""Standard deviations of the base and the task vectors: a few units in the last place of bfloat16, as in fine-tunes."""

_RANK = 8
"""The smaller side over the rank of task vectors: between adapters and full fine-tunes, of which spectral methods keep more."""


def measure_speed(
    method: MergeMethod,
    parameters: Mapping[str, Any],
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    output: torch.dtype,
    compute: torch.dtype,
    *,
    with_base: bool,
    role: str | None,
    data: Sequence[str],
    fused: bool,
) -> float:
    """Return how long a method takes, seconds of a thread per element of a tensor of this shape.

    It takes a fraction of a second. A method for elements or rows runs on two blocks. One for whole tensors or matrices runs on
    small ones of the same proportions, then on larger ones, until one takes long enough or has the tensor's own size; from there
    the time is taken to grow with the cube of the sides, for whole tensors with the square.

    Args:
        method: The merge method.
        parameters: Its parameters, by their names in recipes.
        shape: Shape of the tensor.
        dtypes: Dtypes of the inputs, the base first.
        output: Dtype of the result.
        compute: Dtype of the arithmetic.
        with_base: Whether the first input is the base.
        role: Role of the tensor.
        data: The statistics from data that there are of the tensor, by argument name.
        fused: Whether operations are fused.
    """
    run = partial(
        _seconds,
        method,
        dict(parameters),
        dtypes=dtypes,
        output=output,
        compute=compute,
        with_base=with_base,
        role=role,
        data={name: method.from_data[name] for name in data},
        fused=fused,
    )
    with one_thread():
        if method.scope in ("element", "row"):
            own = _two_blocks(shape)
            # the first run makes the loops
            run(own)
            return min(run(own), run(own)) / max(math.prod(own), 1)
        return _grown(run, shape, 8.0 if method.scope == "matrix" else 4.0)


def _grown(run: Callable[[tuple[int, ...]], float], shape: Sequence[int], growth: float) -> float:
    """Return seconds per element of a shape, from runs on smaller ones.

    Args:
        run: Returns the seconds that a shape takes.
        shape: The shape.
        growth: What the time of a large tensor is multiplied by where its sides are doubled.
    """
    sizes = _growing(shape)
    # the first run loads libraries
    run(sizes[0])
    before = seconds = 0.0
    left = [*sizes]
    while left and seconds <= _ENOUGH:
        before, seconds = seconds, run(left.pop(0))
    step = min(max(seconds / before, 4.0), growth) if before else growth
    for _ in left:
        # what does not grow with the size matters less and less
        step = (step + growth) / 2
        seconds *= step
    return seconds / max(math.prod(sizes[-1]), 1)


def _two_blocks(shape: Sequence[int]) -> tuple[int, ...]:
    columns = min(shape[-1], 2 * BLOCK) if len(shape) > 1 else 1
    size = min(math.prod(shape), 2 * BLOCK)
    rows = max(size // columns, 1)
    return (rows, columns) if len(shape) > 1 else (rows,)


def _growing(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Return shapes of the same proportions, each with sides twice as long, up to the shape itself; of a stack, one matrix."""
    own = tuple(shape[-2:])
    found = [own]
    while max(found[0]) > _SMALLEST:
        found.insert(0, tuple(max(-(-side // 2), 1) for side in found[0]))
    return found


def _seconds(
    method: MergeMethod,
    parameters: dict[str, Any],
    shape: Sequence[int],
    *,
    dtypes: Sequence[torch.dtype],
    output: torch.dtype,
    compute: torch.dtype,
    with_base: bool,
    role: str | None,
    data: Mapping[str, FromData],
    fused: bool,
) -> float:
    generator = torch.Generator().manual_seed(0)
    start = _WEIGHT * torch.randn(tuple(shape), generator=generator)
    models = [(start + _change(method, shape, generator)).to(dtype) for dtype in dtypes[with_base:]]
    base = start.to(dtypes[0]) if with_base else None
    given = {
        name: PerModel(1 if own.of in ("base", "first") else len(models), partial(_statistic, own, shape))
        for name, own in data.items()
    }
    # processor time, as other programs may be running
    began = time.thread_time()
    merge_tensor(
        method,
        base,
        models,
        parameters,
        role=role,
        dtype=output,
        compute=compute,
        fused=fused,
        allow_nonfinite=True,
        data=given,
    )
    return time.thread_time() - began


def _change(method: MergeMethod, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return a random task vector."""
    if method.scope != "matrix" or len(shape) != 2:
        return _CHANGE * torch.randn(tuple(shape), generator=generator)
    rank = max(min(shape) // _RANK, 1)
    left, right = (torch.randn(*sides, generator=generator) for sides in ((shape[0], rank), (rank, shape[1])))
    return _CHANGE / math.sqrt(rank) * (left @ right)


def _statistic(own: FromData, shape: Sequence[int], model: int) -> Tensor:
    """Return a statistic from data: the identity for products of all pairs, otherwise ones."""
    found = own.shape(shape)
    return torch.eye(found[0]) if len(found) == 2 and found[0] == found[1] else torch.ones(found)
