"""How much memory a merge will take, and how many workers fit into a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...errors import MemoryLimitError
from ...wording import size_text
from ...process import memory_here
from ..kernels.blocks import BLOCK, block_shape
from ..kernels.compiled import compiled_ahead
from ..kernels.peak_memory import peak_per_element

if TYPE_CHECKING:
    from .tensor import PlannedTensor

_PYTHON_AND_TORCH = 240_000_000

# what is known of a tensor of an input or of the output
_LISTED = 640

# what was measured of it, and its text in the record
_RECORDED = 1_600
_NUMBER = 32

# loaded kernels; where they are compiled just in time, torch.compile's machinery
_LIBRARIES = 20_000_000
_COMPILER = 190_000_000

# freed memory goes back to the system at once where it is allocated in such pieces; of smaller ones some is kept
_GIVEN_BACK = 32 << 20
_KEPT = 1.4

# most layers of most models, in the inputs of a usual merge
_KEEP_INPUTS = 64 << 20


def default_memory() -> int:
    """Return the default memory limit, bytes: a quarter of what is here, at most 4 GB, at least 1 GB if there is that much."""
    total = memory_here()
    if total is None:
        return 4_000_000_000
    return min(max(total // 4, 1_000_000_000), 4_000_000_000, total)


def fit_workers(tensors: Sequence[PlannedTensor], wanted: int, compiled: bool, limit: int, *, beside: int = 0) -> int:
    """Return how many workers, at most `wanted`, stay within a memory limit.

    Args:
        tensors: What they work on.
        wanted: How many there shall be.
        compiled: Whether kernels are fused.
        limit: Largest resident memory, bytes.
        beside: What else will be held, bytes.

    Raises:
        MemoryLimitError: Not even one does.
    """
    fixed, each = _needs(tensors, compiled)
    needed = beside + fixed + each
    if needed > limit:
        largest = max(tensors, key=lambda tensor: (_held(tensor, compiled), tensor.size))
        raise MemoryLimitError(
            f"--max-memory: {largest.method.name} needs {size_text(needed)} for this merge, "
            f"{size_text(limit)} are allowed; its largest tensor is {largest.name} {list(largest.shape)}"
        )
    return min(1 + (limit - needed) // max(each, 1), wanted)


def estimate_memory(tensors: Sequence[PlannedTensor], workers: int, compiled: bool) -> int:
    """Estimate the largest resident memory of a run, bytes: within a quarter of what was measured for our methods."""
    fixed, each = _needs(tensors, compiled)
    return fixed + workers * each


def _needs(tensors: Sequence[PlannedTensor], compiled: bool) -> tuple[int, int]:
    """Return what the process needs, and what each worker adds to it, bytes."""
    largest = bundle = 0
    kinds = _kinds(tensors)
    for tensor in kinds:
        largest = max(largest, _held(tensor, compiled))
        if _block(tensor) == tensor.size:
            # many are put together in copies, and merged as one block
            merged = tensor.together == "joined" or (tensor.together == "stacked" and not compiled)
            bundle = max(bundle, _raw(tensor) + (_raw(tensor) + _eager(tensor) if merged else 0))
    needed = max(largest, _largest_bundle(tensors) * bundle)
    ahead = all(compiled_ahead(method) for method in {tensor.method.name: tensor.method for tensor in kinds}.values())
    listed = sum(_LISTED * (1 + len(tensor.inputs)) + _RECORDED + _NUMBER * _numbers(tensor) for tensor in tensors)
    return _PYTHON_AND_TORCH + listed + ((_LIBRARIES if ahead else _COMPILER) if compiled else 0), needed


def _largest_bundle(tensors: Sequence[PlannedTensor]) -> int:
    """Return the elements of the small tensors that may be worked on together: neighbours, up to a block's elements."""
    largest = filled = 0
    for tensor in tensors:
        filled = min(filled + tensor.size, BLOCK) if _block(tensor) == tensor.size else 0
        largest = max(largest, filled)
        if largest == BLOCK:
            break
    return largest


def _kinds(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """Return a tensor of each kind that needs memory of its own."""
    found: dict[tuple[Any, ...], PlannedTensor] = {}
    for tensor in tensors:
        key: tuple[Any, ...] = (tensor.method.name, tensor.copy, tensor.shape, tensor.role, tensor.dtype.name)
        whole = tensor.method.scope in ("tensor", "matrix")
        key += (tensor.name,) if whole else tuple(source.dtype.name for source in tensor.inputs)
        found.setdefault(key, tensor)
    return list(found.values())


def kept_memory(tensors: Sequence[PlannedTensor], workers: int, room: int) -> int:
    """Return what each worker may keep of the inputs of a tensor from pass to pass, bytes.

    Args:
        tensors: What they work on.
        workers: How many there are.
        room: What is left for all of them, bytes.
    """
    limit = min(_KEEP_INPUTS, room // workers)
    return max((kept for tensor in tensors if (kept := kept_bytes(tensor)) <= limit), default=0)


def _held(tensor: PlannedTensor, compiled: bool) -> int:
    """Return what a worker holds while it works on a tensor, bytes: one block, in and out, and the arithmetic."""
    block = _block(tensor)
    raw = _raw(tensor)
    if tensor.method.scope in ("tensor", "matrix") and not tensor.copy and block:
        # pieces are matrices in float64
        kept = 1.0 if 8 * block >= _GIVEN_BACK else _KEPT
        return math.ceil(block * (raw + kept * _probed(tensor)))
    return block * (raw + (_fused(tensor) if compiled and block >= BLOCK // 2 else _eager(tensor)))


def _block(tensor: PlannedTensor) -> int:
    return tensor.size if tensor.copy else min(tensor.block, tensor.size)


def _numbers(tensor: PlannedTensor) -> int:
    """Return how many numbers are measured of a tensor for the record."""
    models = len(tensor.models)
    return len(tensor.inputs) + 2 + (models * (3 * models - 1) // 2 if tensor.base is not None else 0)


def _raw(tensor: PlannedTensor) -> int:
    """Return what an element takes as it lies in the files, bytes."""
    return sum(t.dtype.itemsize for t in tensor.inputs) + tensor.dtype.itemsize


def _fused(tensor: PlannedTensor) -> int:
    """Return what fused arithmetic adds to an element, bytes, as measured: it holds what is counted or ranked."""
    method = tensor.method
    counts = any(round_.tally for statistic in method.statistics.values() for round_ in statistic.rounds)
    return 8 * len(tensor.inputs) + 24 if counts or (method.scope == "row" and method.random) else 0


def _eager(tensor: PlannedTensor) -> int:
    """Return what eager arithmetic on small blocks adds to an element, bytes, as measured."""
    n = len(tensor.inputs)
    eager = 12 * n + 50 if tensor.together == "joined" else 24 * n + 70
    return eager * tensor.compute_dtype.itemsize // 4


def _probed(tensor: PlannedTensor) -> float:
    """Return what a method for whole tensors adds to an element, bytes, as it does on small ones."""
    shape = block_shape(tensor.working_shape, tensor.method.scope, tensor.size)
    return peak_per_element(
        tensor.method,
        tensor.parameters,
        shape,
        [getattr(torch, source.dtype.name) for source in tensor.inputs],
        getattr(torch, tensor.dtype.name),
        getattr(torch, tensor.compute_dtype.name),
        with_base=tensor.base is not None,
    )


_ALIGNMENT = 64


def kept_bytes(tensor: PlannedTensor) -> int:
    """Return what keeping the inputs of a tensor takes, bytes; 0 where they are not looked at several times in a row."""
    if tensor.size <= tensor.block or tensor.passes == 1 or tensor.over_model:
        return 0
    return sum(_aligned(source.nbytes) for source in tensor.inputs)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
