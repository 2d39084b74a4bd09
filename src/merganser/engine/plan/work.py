"""How long the arithmetic of a merge takes, from a rate per method that is kept of the last merge on this machine.

The work of a method that goes by elements is elements x inputs x passes. That of a method for whole matrices is the sum of
rows x columns x the smaller of both, as in a singular value decomposition, over matrices and inputs. A rate is the time of one thread
per unit of work. Before the first merge by a method its kind has a rate that was measured on two cores of a virtual machine.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ...files import write_whole
from ...method import MergeMethod
from .tensor import PlannedTensor

__all__ = ["arithmetic_seconds", "keep_rate", "kept_rates"]

_MATRIX, _FUSED, _BY_OPERATION = 3e-10, 1e-9, 1e-8
"""Rates of methods of which none is kept, seconds of a thread per unit of work."""

_LEAST_SECONDS = 2.0
"""Time of arithmetic below which a merge says little about a rate."""


def arithmetic_seconds(tensors: Iterable[PlannedTensor], workers: int, *, fused: bool) -> float:
    """Return the time of the arithmetic, seconds.

    Args:
        tensors: The output's tensors.
        workers: Threads that merge.
        fused: Whether operations are fused.
    """
    rates = kept_rates()
    work = _work(tensors)
    return sum(units * _rate(method, rates, fused) for method, units in work.items()) / _threads(workers)


def keep_rate(tensors: Iterable[PlannedTensor], workers: int, seconds: float, moving: float) -> None:
    """Keep the rate of the method that did most of the work; nothing is kept of a short merge, or if it cannot be.

    Args:
        tensors: The output's tensors.
        workers: Threads that merged.
        seconds: Time that the merge took.
        moving: The part of it that reading and writing are expected to take.
    """
    work = _work(tensors)
    if seconds - moving < _LEAST_SECONDS or not work:
        return
    method, units = max(work.items(), key=lambda item: item[1] * _rate(item[0], {}, fused=True))
    rates = {**kept_rates(), _key(method): (seconds - moving) * _threads(workers) / units}
    with suppress(Exception):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(rates, indent=1) + "\n")


def kept_rates() -> Mapping[str, float]:
    """Return the kept rates by method and version; none if there is no such file, or it is damaged."""
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        str(name): float(rate)
        for name, rate in found.items()
        if isinstance(rate, int | float) and math.isfinite(rate) and rate > 0
    }


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merganser" / "rates.json"


def _key(method: MergeMethod) -> str:
    return f"{method.name} {method.version}"


def _rate(method: MergeMethod, rates: Mapping[str, float], fused: bool) -> float:
    by_elements = _FUSED if fused and method.fuse else _BY_OPERATION
    return rates.get(_key(method), _MATRIX if method.scope == "matrix" else by_elements)


def _threads(workers: int) -> int:
    return max(1, min(workers, os.cpu_count() or 1))


def _work(tensors: Iterable[PlannedTensor]) -> Counter[MergeMethod]:
    found: Counter[MergeMethod] = Counter()
    # many tensors share one set of parameters
    passes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.copy:
            continue
        inputs = len(tensor.models) + (tensor.base is not None)
        if tensor.method.scope == "matrix" and len(tensor.shape) > 1:
            found[tensor.method] += tensor.size * min(tensor.shape[-2:]) * inputs
        else:
            shared = id(tensor.parameters)
            if shared not in passes:
                passes[shared] = tensor.passes
            found[tensor.method] += tensor.size * inputs * passes[shared]
    return found
