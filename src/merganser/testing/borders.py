"""Laws about what is declared: statistics that are read, and parameters that may stand at the borders of their ranges."""

from __future__ import annotations

import dis
import math
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any

import torch

from ..errors import CheckpointError, ParameterError
from ..method import MergeMethod, Statistic
from ..method.method import fill
from .cases import count_models, defaults, make_inputs, merge

__all__ = ["reads_its_statistics", "stays_finite_at_borders"]


def reads_its_statistics(method: MergeMethod) -> None:
    """Every declared statistic is read: by the method, or by the measuring of another statistic."""
    for name in method.statistics:
        readers = [method.combine, *_functions(s for other, s in method.statistics.items() if other != name)]
        if not any(_reads(reader, name) for reader in readers):
            raise AssertionError(
                f"{method.name}: nothing reads the statistic {name!r}, which costs passes over the inputs"
            )


def stays_finite_at_borders(method: MergeMethod) -> None:
    """A parameter at a border of its range gives no NaN or infinity on ordinary inputs; it may be refused."""
    n = count_models(method)
    for with_base, given in defaults(method):
        inputs = make_inputs(method, with_base)
        for name, value in _borders(method, n):
            parameters = {**given, name: value}
            try:
                fill(method, parameters, n)
                result = merge(method, inputs, parameters, allow_nonfinite=True)
            except (CheckpointError, ParameterError):
                continue
            if not bool(torch.isfinite(result).all()):
                raise AssertionError(f"{method.name}: not finite at {name} = {value}, a border of its range")


def _borders(method: MergeMethod, n: int) -> Iterator[tuple[str, Any]]:
    for name, parameter in method.parameters.items():
        allowed = parameter.range
        if parameter.kind not in ("number", "integer") or allowed is None or allowed.open:
            continue
        for border in (allowed.low, allowed.high):
            if math.isfinite(border):
                value = int(border) if parameter.kind == "integer" else border
                yield name, [value] * n if parameter.per_model else value


def _functions(statistics: Iterable[Statistic]) -> Iterator[Callable[..., Any]]:
    for statistic in statistics:
        for one in statistic.rounds:
            yield one.measure
            yield one.solve


def _reads(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function takes a statistic and has an instruction that loads it."""
    if name in getattr(function, "_takes", ()):
        return True  # a generated function, which takes all arguments in one mapping
    inner = getattr(function, "func", function)  # of functools.partial
    code = getattr(inner, "__code__", None)
    if code is None or not isinstance(code, CodeType):
        return True  # not Python code, so nothing can be said
    return name in _loaded(code)


def _loaded(code: CodeType) -> set[str]:
    found: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith("LOAD_"):
            names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
            found.update(each for each in names if isinstance(each, str))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _loaded(constant)
    return found
