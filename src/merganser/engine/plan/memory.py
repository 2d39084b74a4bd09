"""Estimate how much memory a merge takes, and how many workers fit into a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...checkpoint import reader
from ...errors import MemoryLimitError
from ...process import memory_here
from ...wording import size_text
from ..kernels.blocks import BLOCK, block_shape
from ..kernels.peak_memory import peak_per_element

if TYPE_CHECKING:
    from .tensor import PlannedTensor

_PYTHON_AND_TORCH = 240_000_000

# bytes of Python objects per listed tensor, of an input or of the output
_LISTED = 640

# bytes per output tensor for its measurements and its text in the record; bytes per measured number
_RECORDED = 1_600
_NUMBER = 32

# bytes of LLVM and what it makes
_LLVM = 60_000_000

# the allocator returns freed pieces of at least this size to the system at once; it keeps some smaller ones,
# so their peak memory is multiplied by _KEPT
_GIVEN_BACK = 32 << 20
_KEPT = 1.4

# bytes of temporaries while values are dequantised or otherwise computed, a block at a time
_COMPUTED = 24 * BLOCK

# bytes per element of temporaries while values are rounded to float8, or to a type of GGUF
_ENCODING = 14

# bytes of inputs that a worker may cache; enough for most layers of most models
_KEEP_INPUTS = 64 << 20


def default_memory() -> int:
    """Return the default memory limit, bytes: a quarter of the machine's memory, at least 1 GB and at most 4 GB."""
    total = memory_here()
    if total is None:
        return 4_000_000_000
    return min(max(total // 4, 1_000_000_000), 4_000_000_000, total)


class Needs(NamedTuple):
    """The largest resident memory of a run.

    Args:
        fixed: Of the process without workers, bytes.
        worker: Of each worker, bytes.
    """

    fixed: int
    worker: int

    def of(self, workers: int) -> int:
        """Return the memory of a run with so many workers, bytes."""
        return self.fixed + workers * self.worker


def fit_workers(
    tensors: Sequence[PlannedTensor], wanted: int, fused: bool, needs: Needs, limit: int, *, beside: int = 0
) -> int:
    """Return how many workers, at most `wanted`, stay within a memory limit.

    Args:
        tensors: The tensors of the plan.
        wanted: Preferred number of workers.
        fused: Whether operations are fused.
        needs: From `memory_needs`.
        limit: Largest resident memory, bytes.
        beside: Other memory of the process, bytes.

    Raises:
        MemoryLimitError: One worker alone exceeds it.
    """
    each = needs.worker
    needed = beside + needs.of(1)
    if needed > limit:
        largest = max(tensors, key=lambda tensor: (_held(tensor, fused), tensor.size))
        told = size_text if size_text(needed) != size_text(limit) else "{:,} bytes".format
        raise MemoryLimitError(
            f"--max-memory: {largest.method.name} needs {told(needed)} for this merge, "
            f"{told(limit)} are allowed; raise it. The largest tensor is {largest.name} {list(largest.shape)}"
        )
    return min(1 + (limit - needed) // max(each, 1), wanted)


def estimate_memory(tensors: Sequence[PlannedTensor], workers: int, fused: bool) -> int:
    """Estimate the largest resident memory of a run, bytes; within 25% of measured values for the built-in methods."""
    return memory_needs(tensors, fused).of(workers)


def memory_needs(tensors: Sequence[PlannedTensor], fused: bool) -> Needs:
    """Estimate what a run needs, as `estimate_memory` does.

    Args:
        tensors: The tensors of the plan.
        fused: Whether operations are fused.
    """
    largest = bundle = 0
    kinds = _kinds(tensors)
    for tensor in kinds:
        largest = max(largest, _held(tensor, fused))
        if _block(tensor) == tensor.size:
            # small tensors are concatenated (a copy) and merged as one block
            arithmetic = _eager(tensor)
            if fused:
                # the loops do everything but the order statistics of stacks, which torch finds
                arithmetic = max(12 * len(tensor.inputs) if tensor.together == "stacked" else 0, _fused(tensor))
            bundle = max(bundle, _raw(tensor) + (_raw(tensor) + arithmetic if tensor.together else 0))
    needed = max(largest, _largest_bundle(tensors) * bundle)
    loops = fused and any(tensor.method.fuse and not tensor.copy for tensor in kinds)
    listed = sum(_LISTED * (1 + len(tensor.inputs)) + _RECORDED + _NUMBER * _numbers(tensor) for tensor in tensors)
    return Needs(_PYTHON_AND_TORCH + listed + (_LLVM if loops else 0), needed + fetched_memory(tensors))


def fetched_memory(tensors: Sequence[PlannedTensor]) -> int:
    """Return how many bytes of remote files a worker keeps in memory between reads."""
    return max((reader.fetched_memory(tensor.inputs) for tensor in tensors), default=0)


def _largest_bundle(tensors: Sequence[PlannedTensor]) -> int:
    """Return the most elements in a bundle: consecutive small tensors, up to one block."""
    largest = filled = 0
    for tensor in tensors:
        filled = min(filled + tensor.size, tensor.block_limit) if _block(tensor) == tensor.size else 0
        largest = max(largest, filled)
        if largest == tensor.block_limit:
            break
    return largest


def _kinds(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """Return one tensor of each kind: tensors of a kind need the same memory per worker."""
    found: dict[tuple[Any, ...], PlannedTensor] = {}
    for tensor in tensors:
        key: tuple[Any, ...] = (tensor.method.name, tensor.copy, tensor.shape, tensor.role, tensor.stored_as)
        key += (any(source.stored for source in tensor.inputs),)
        whole = tensor.method.scope in ("tensor", "matrix")
        key += (tensor.name,) if whole else tuple(source.dtype.name for source in tensor.inputs)
        found.setdefault(key, tensor)
    return list(found.values())


def kept_memory(tensors: Sequence[PlannedTensor], workers: int, room: int) -> int:
    """Return how many bytes of a tensor's inputs each worker may cache between passes.

    Args:
        tensors: The tensors of the plan.
        workers: Number of workers.
        room: Memory left for all their caches, bytes.
    """
    limit = min(_KEEP_INPUTS, room // workers)
    return max((kept for tensor in tensors if (kept := kept_bytes(tensor)) <= limit), default=0)


def _held(tensor: PlannedTensor, fused: bool) -> int:
    """Return a worker's memory while it merges a tensor, bytes: one block of inputs and output, and temporaries."""
    block = _block(tensor)
    raw = _raw(tensor)
    computed = _COMPUTED if any(source.stored for source in tensor.inputs) else 0
    if tensor.method.scope in ("tensor", "matrix") and not tensor.copy and block:
        # temporaries are matrices in float64
        kept = 1.0 if 8 * block >= _GIVEN_BACK else _KEPT
        return math.ceil(block * (raw + kept * _probed(tensor))) + computed
    return block * (raw + (_fused(tensor) if fused else _eager(tensor))) + computed


def _block(tensor: PlannedTensor) -> int:
    return tensor.size if tensor.copy else min(tensor.block, tensor.size)


def _numbers(tensor: PlannedTensor) -> int:
    """Return how many numbers the record holds per tensor."""
    models = len(tensor.models)
    return len(tensor.inputs) + 2 + (models * (3 * models - 1) // 2 if tensor.base is not None else 0)


def _raw(tensor: PlannedTensor) -> int:
    """Return the bytes per element of all inputs and the output, in their stored dtypes."""
    found = sum(t.dtype.itemsize for t in tensor.inputs) + tensor.result_dtype.itemsize
    return found + (_ENCODING if tensor.is_encoded else 0)


def _fused(tensor: PlannedTensor) -> int:
    """Return the bytes per element of temporaries beside loops: 0 unless they rank; those of foreign methods are measured."""
    if tensor.method.foreign and not tensor.copy:
        # it may refuse random numbers; a plan must not fail for its memory
        with suppress(Exception):
            return math.ceil(_probed(tensor, fused=True))
        return _eager(tensor)
    return 13 * len(tensor.inputs) + 24 if tensor.method.scope == "row" and tensor.method.random else 0


def _eager(tensor: PlannedTensor) -> int:
    """Return the measured bytes per element of eager temporaries."""
    n = len(tensor.inputs)
    eager = 12 * n + 50 if tensor.together == "joined" else 24 * n + 70
    return eager * tensor.compute_dtype.itemsize // 4


def _probed(tensor: PlannedTensor, *, fused: bool = False) -> float:
    """Return the bytes per element of a method's temporaries, measured on small tensors."""
    shape = block_shape(tensor.working_shape, tensor.method.scope, tensor.size)
    return peak_per_element(
        tensor.method,
        tensor.parameters,
        shape,
        [getattr(torch, source.dtype.name) for source in tensor.inputs],
        getattr(torch, tensor.dtype.name),
        getattr(torch, tensor.compute_dtype.name),
        with_base=tensor.base is not None,
        fused=fused,
    )


_ALIGNMENT = 64


def kept_bytes(tensor: PlannedTensor) -> int:
    """Return the bytes to cache a tensor's inputs; 0 if no later pass over them follows directly."""
    if tensor.size <= tensor.block or tensor.passes == 1 or tensor.over_model:
        return 0
    return sum(aligned(source.nbytes) for source in tensor.inputs)


def aligned(nbytes: int) -> int:
    """Round a size up to the alignment of cached inputs, bytes."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
