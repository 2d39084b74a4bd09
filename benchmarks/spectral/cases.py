"""One case: a method, a shape, a number of models. Both sides merge the same task vectors."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.method.registry import get_method

METHODS = ("iso_c", "iso_cts", "tsv_m", "wudi", "svc")

PUBLISHED_STEPS = 300
"""Of Adam, in WUDI."""

Merge = Callable[[Sequence[Tensor]], Tensor]
Run = tuple[dict[str, float], Tensor]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        method: Name of the method.
        shape: Rows and columns.
        models: Number of task vectors.
        seed: Of the draws.
    """

    method: str
    shape: tuple[int, int]
    models: int
    seed: int = 0

    @property
    def key(self) -> str:
        """Shape, number of models and seed, for file names."""
        return f"{self.shape[0]}x{self.shape[1]}-{self.models}-{self.seed}"

    def vectors(self) -> list[Tensor]:
        """Draw the task vectors: N(0, 0.001), float32."""
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randn(self.shape, generator=generator) * 1e-3 for _ in range(self.models)]


def ours(method: str, steps: int | None) -> Merge:
    """Return our merge, of task vectors beside a base of zeros.

    Args:
        method: Name of the method.
        steps: Of Adam, for WUDI; None: its default, a closed form.
    """
    found = get_method(method)
    parameters = {"solver": "adam", "steps": steps} if method == "wudi" and steps else {}

    def merge(vectors: Sequence[Tensor]) -> Tensor:
        return merge_tensor(found, torch.zeros_like(vectors[0]), vectors, parameters)

    return merge


def run_alone(merge: Merge, vectors: Sequence[Tensor], threads: int) -> Run:
    """Merge one matrix with all threads."""
    torch.set_num_threads(threads)
    start, cpu = time.perf_counter(), time.process_time()
    merged = merge(vectors)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}, merged


def run_side_by_side(merge: Merge, vectors: Sequence[Tensor], threads: int) -> Run:
    """Merge one matrix per thread, as the engine does."""
    torch.set_num_threads(1)
    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        merged = list(pool.map(merge, [vectors] * threads))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds / threads, "cpu_seconds": cpu / threads}, merged[0]


def best(runs: Sequence[Run]) -> tuple[dict[str, Any], Tensor]:
    """Return the times of the fastest run, with the seconds of all, and a result."""
    fastest, merged = min(runs, key=lambda run: run[0]["seconds"])
    return {**fastest, "all_seconds": [taken["seconds"] for taken, _ in runs]}, merged


def extrapolated(first: dict[str, Any], few: dict[str, Any], steps: int) -> dict[str, float]:
    """Return the times of as many steps as are published, from those of one and of a few."""
    factor = (PUBLISHED_STEPS - 1) / (steps - 1)
    return {key: first[key] + factor * (few[key] - first[key]) for key in ("seconds", "cpu_seconds")}


def error(merged: Tensor, expected: Tensor) -> float:
    """Return the norm of the error over the norm of what was expected."""
    return float((merged.double() - expected).norm() / expected.norm())
