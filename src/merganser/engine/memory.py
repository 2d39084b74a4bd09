"""How much memory a merge will take, and how many workers fit into a limit."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import MemoryLimitError
from ..method import MergeMethod
from .blocks import BLOCK, block_step

if TYPE_CHECKING:
    from .plan import PlannedTensor

_PYTHON_AND_TORCH = 240_000_000
# torch.compile's machinery and the kernels that it loads
_COMPILER = 190_000_000


def default_memory() -> int:
    """Return the default memory limit, bytes: a quarter of the machine's memory, at most 4 GB, at least 1 GB."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 4_000_000_000
    return max(min(total // 4, 4_000_000_000), 1_000_000_000)


def fit_workers(method: MergeMethod, tensors: Sequence[PlannedTensor], wanted: int, compiled: bool, limit: int) -> int:
    """Return how many workers, at most `wanted`, stay within a memory limit.

    Raises:
        MemoryLimitError: Not even one does.
    """
    needed = estimate_memory(method, tensors, 1, compiled)
    if needed > limit:
        largest = max(tensors, key=lambda tensor: tensor.size)
        raise MemoryLimitError(
            f"--max-memory: {method.name} needs {needed / 1e6:.0f} MB for this merge, {limit / 1e6:.0f} MB are allowed; "
            f"its largest tensor is {largest.name} {list(largest.shape)}"
        )
    further = max(estimate_memory(method, tensors, 2, compiled) - needed, 1)
    return min(1 + (limit - needed) // further, wanted)


def estimate_memory(method: MergeMethod, tensors: Sequence[PlannedTensor], workers: int, compiled: bool) -> int:
    """Estimate the largest resident memory of a run, bytes: within a quarter of what was measured for our methods."""
    plain = method.scope == "element" and not method.statistics and not method.random
    largest = small = bundle = 0
    for tensor in tensors:
        size = math.prod(tensor.shape)
        block = size if tensor.copy else min(block_step(tensor.shape, method.scope), size)
        raw, eager = _bytes_per_element(tensor, plain)
        largest = max(largest, block * (raw if compiled and block >= BLOCK // 2 else raw + eager))
        if block == size:
            small += size
            # what is measured for the record, in float64; plain methods merge a bundle as one block
            bundle = max(bundle, raw + max(8 * (len(tensor.inputs) + 2), eager if plain else 0))
    # small tensors are worked on in bundles of a block's elements, at most
    needed = max(largest, min(small, BLOCK) * bundle)
    return _PYTHON_AND_TORCH + (_COMPILER if compiled else 0) + workers * needed


def _bytes_per_element(tensor: PlannedTensor, plain: bool) -> tuple[int, int]:
    """Return what an element takes as it lies in the files, and what eager arithmetic adds, as measured."""
    raw = sum(t.dtype.itemsize for t in tensor.inputs) + tensor.dtype.itemsize
    n = len(tensor.inputs)
    eager = 12 * n + 50 if plain else 24 * n + 70
    wide = "float64" in (tensor.dtype.name, *(t.dtype.name for t in tensor.inputs))
    return raw, eager * (2 if wide else 1)
