"""How long the arithmetic of a merge takes, from measurements on this machine that are kept.

The first plan that is asked for its time runs each of its methods on a little random data (`kernels.speed`). A merge that took
long enough corrects what was measured, and the next plan with the same method and parameters starts from that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...files import write_whole
from ..kernels.speed import measure_speed
from .tensor import PlannedTensor

__all__ = ["arithmetic_seconds", "keep_speeds", "kept_speeds"]

_LEAST_SECONDS = 2.0
"""Processor time of a merge below which it says little about a speed."""

_LARGEST_FACTOR = 10.0
"""A merge that took this many times what was expected did something else than arithmetic, and is not kept."""

_MOST_KEPT = 300

_MOST_MEASURED = 6
"""Shapes per method that are measured; further ones, of fewer elements, count as the slowest of them."""

_SMALL = 1 << 16
"""Elements below which a tensor takes about as long as one of any size: its speed says nothing about those of large ones."""

_UNMEASURED = 3e-9
"""Seconds per element and input of a method that cannot be run on random numbers."""


@dataclass(slots=True)
class _Kind:
    """Tensors that a method merges in the same way.

    Args:
        like: One of them, with the parameters of the first.
        elements: The elements of all of them.
    """

    like: PlannedTensor
    elements: int = 0


def arithmetic_seconds(tensors: Iterable[PlannedTensor], workers: int, *, fused: bool) -> float:
    """Return the time of the arithmetic, seconds; measure and keep the speeds of methods of which none is kept.

    Args:
        tensors: The output's tensors.
        workers: Threads that merge.
        fused: Whether operations are fused.
    """
    return sum(_seconds(tensors, fused).values()) / _threads(workers)


def keep_speeds(tensors: Iterable[PlannedTensor], seconds: float, beside: float, *, fused: bool) -> None:
    """Correct the speed of the method that did most of a merge's work; nothing is kept of a short merge.

    Args:
        tensors: The output's tensors.
        seconds: Processor time that the merge took.
        beside: The part of it that reading and writing are expected to take.
        fused: Whether operations were fused.
    """
    if seconds - beside < _LEAST_SECONDS:
        return
    expected = _seconds(tensors, fused)
    methods: defaultdict[str, float] = defaultdict(float)
    for key, own in expected.items():
        methods[_method_of(key)] += own
    if not methods:
        return
    main = max(methods, key=lambda name: methods[name])
    most = methods[main]
    factor = (seconds - beside - sum(methods.values()) + most) / max(most, 1e-9)
    kept = kept_speeds()
    if 1 / _LARGEST_FACTOR < factor < _LARGEST_FACTOR:
        _keep({key: kept[key] * factor for key in expected if key in kept and _method_of(key) == main})


def kept_speeds() -> dict[str, float]:
    """Return the kept seconds per element by method, version and settings; none if there is no such file, or it is damaged."""
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        str(name): float(speed)
        for name, speed in found.items()
        if isinstance(speed, int | float) and math.isfinite(speed) and speed > 0
    }


def _seconds(tensors: Iterable[PlannedTensor], fused: bool) -> dict[str, float]:
    """Return the time of a thread for each kind of tensors, by the key of its speed."""
    kept = kept_speeds()
    found: dict[str, float] = {}
    fresh: dict[str, float] = {}
    per_method: Counter[str] = Counter()
    for kind in sorted(_kinds(tensors), key=lambda kind: -kind.elements):
        key, name = _key(kind.like, fused), kind.like.method.name
        if key not in kept:
            if per_method[name] < _MOST_MEASURED:
                fresh[key] = _measured(kind.like, fused)
            per_method[name] += 1
            kept[key] = (
                fresh[key] if key in fresh else max(own for other, own in kept.items() if _method_of(other) == name)
            )
        found[key] = found.get(key, 0.0) + kind.elements * kept[key]
    if fresh:
        _keep(fresh)
    return found


def _measured(tensor: PlannedTensor, fused: bool) -> float:
    # a method may refuse random numbers, or data of this kind; a plan must not fail for its time
    with suppress(Exception):
        return measure_speed(
            tensor.method,
            tensor.parameters,
            tensor.shape[:-3:-1] if tensor.turned else tensor.shape,
            [getattr(torch, source.dtype.name) for source in tensor.inputs],
            getattr(torch, tensor.result_dtype.name),
            getattr(torch, tensor.compute_dtype.name),
            with_base=tensor.base is not None,
            role=tensor.role,
            data=list(tensor.data),
            fused=fused,
        )
    return _UNMEASURED * len(tensor.inputs)


def _keep(fresh: Mapping[str, float]) -> None:
    with suppress(Exception):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        # what is fresh at the end, so that the oldest are dropped
        kept = {key: speed for key, speed in kept_speeds().items() if key not in fresh} | dict(fresh)
        write_whole(path, json.dumps(dict([*kept.items()][-_MOST_KEPT:]), indent=1) + "\n")


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merganser" / "speeds.json"


def _key(tensor: PlannedTensor, fused: bool) -> str:
    """Return what the speed depends on: the method, and a hash of its parameters, inputs and dtypes."""
    facts = [
        sorted(tensor.parameters.items()),
        [source.dtype.name for source in tensor.inputs],
        tensor.compute_dtype.name,
        sorted(tensor.data),
        _shape(tensor),
        fused,
    ]
    settings = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    return f"{tensor.method.name} {tensor.method.version} {settings}"


def _method_of(key: str) -> str:
    return key.partition(" ")[0]


def _shape(tensor: PlannedTensor) -> tuple[int, ...] | str:
    """Return what of the shape the time per element depends on."""
    if tensor.method.scope in ("tensor", "matrix"):
        return tensor.shape[-2:]
    return "small" if tensor.size < _SMALL else "large"


def _threads(workers: int) -> int:
    return max(1, min(workers, os.cpu_count() or 1))


def _kinds(tensors: Iterable[PlannedTensor]) -> list[_Kind]:
    """Return the kinds of tensors; those of a method with other parameters count as the kind of the first."""
    found: dict[tuple[Any, ...], _Kind] = {}
    for tensor in tensors:
        if tensor.copy or not tensor.size:
            continue
        kind = found.setdefault((tensor.method, _shape(tensor), len(tensor.inputs)), _Kind(tensor))
        kind.elements += tensor.size
    return [*found.values()]
