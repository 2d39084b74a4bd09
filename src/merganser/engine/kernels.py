"""Turn a merge method into the functions that the engine runs on blocks.

A kernel reads blocks as they lie in the files, converts them to the compute dtype, calls the method, rounds once to
the output dtype and says whether everything it read was finite. On large work it is fused by `torch.compile`; the
source is the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..method import MergeMethod, Statistic, takes
from ..ops.random import Random

# (kind, name, round): ("combine", "", 0) or ("measure", "cut", 1)
_Phase = tuple[str, str, int]


@dataclass(frozen=True)
class Values:
    """Parameters of one output tensor, in the forms that kernels and solvers take.

    Args:
        static: Flags, counts and choices, and which statistics are wanted ("measure NAME").
        numbers: Numeric parameters, float64: 0-d, or shape [T].
    """

    static: Mapping[str, Any]
    numbers: Mapping[str, Tensor]

    @classmethod
    def of(cls, method: MergeMethod, parameters: Mapping[str, Any]) -> Values:
        """Sort resolved parameters, by their names in recipes, into the two kinds."""
        static: dict[str, Any] = {}
        numbers: dict[str, Tensor] = {}
        for name, value in parameters.items():
            parameter = method.parameters[name]
            if parameter.kind == "number":
                numbers[parameter.argument] = torch.tensor(value, dtype=torch.float64)
            else:
                static[parameter.argument] = value
        static.update({f"measure {name}": s.wanted(parameters) for name, s in method.statistics.items()})
        return cls(static, numbers)


@dataclass
class Kernels:
    """The kernels of a method for one combination of static parameters and dtypes.

    Args:
        method: The merge method.
        static: Flags, counts and choices by argument name, and which statistics are wanted, as in `Values`.
        compute: float32, or float64 where an input or the output is.
        output: Dtype of the result.
        device: Where the kernels run.
        compiled: Fuse with `torch.compile`.
        check_finite: Whether kernels look for NaN and infinity.
    """

    method: MergeMethod
    static: Mapping[str, Any]
    compute: torch.dtype
    output: torch.dtype
    device: torch.device
    compiled: bool = False
    check_finite: bool = True
    _functions: dict[_Phase, Callable[..., Any]] = field(default_factory=dict, repr=False)

    @cached_property
    def statistics(self) -> list[tuple[str, Statistic, str]]:
        """Statistics to measure, in order: name, declaration, "tensor" or "model"."""
        return [
            (name, statistic, str(self.static.get(statistic.over, statistic.over)))
            for name, statistic in self.method.statistics.items()
            if self.static[f"measure {name}"]
        ]

    def numbers(self, values: Values) -> dict[str, Tensor]:
        """Return numeric parameters on the device."""
        return {name: value.to(self.device) for name, value in values.numbers.items()}

    def measure(
        self,
        name: str,
        index: int,
        base: Tensor | None,
        models: Sequence[Tensor],
        numbers: Mapping[str, Tensor],
        known: Mapping[str, Tensor],
        keys: Tensor,
        offset: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Measure one block: round `index` of statistic `name`; also say whether the block is finite."""
        function = self._function(("measure", name, index))
        measured, finite = function(base, list(models), dict(numbers), dict(known), keys, offset)
        tally = self.method.statistics[name].rounds[index].tally
        return (measured if tally is None else tally(measured)), finite

    def solve(self, name: str, index: int, measured: Tensor, values: Values, known: Mapping[str, Tensor]) -> Tensor:
        """Solve a round of a statistic from the sum of its measurements.

        Args:
            name: Name of the statistic.
            index: Index of the round.
            measured: The sum over all blocks, on the CPU.
            values: Parameters of the tensor.
            known: Earlier statistics, `previous` and `size`, on the CPU.
        """
        solve = self.method.statistics[name].rounds[index].solve
        first, *rest = takes(solve)
        given = {**self.static, **values.numbers, **known}
        return solve(**{first: measured}, **{key: given[key] for key in rest})

    def combine(
        self,
        base: Tensor | None,
        models: Sequence[Tensor],
        numbers: Mapping[str, Tensor],
        known: Mapping[str, Tensor],
        keys: Tensor,
        offset: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Merge one block; also say whether the inputs and the result are finite."""
        function = self._function(("combine", "", 0))
        result: tuple[Tensor, Tensor] = function(base, list(models), dict(numbers), dict(known), keys, offset)
        return result

    def to_device(self, solved: Tensor) -> Tensor:
        """Move a solved statistic to where kernels take it: floats in the compute dtype, integers as they are."""
        return solved.to(self.device, self.compute) if solved.is_floating_point() else solved.to(self.device)

    def _function(self, phase: _Phase) -> Callable[..., Any]:
        if phase not in self._functions:
            kind, name, index = phase
            if kind == "combine":
                function = self._call(self.method.combine, round_to=self.output)
            else:
                function = self._call(self.method.statistics[name].rounds[index].measure, round_to=None)
            self._functions[phase] = _compile(function) if self.compiled else function
        return self._functions[phase]

    def _call(self, function: Callable[..., Tensor], *, round_to: torch.dtype | None) -> Callable[..., Any]:
        """Wrap a measure or combine function: conversion, what it takes by name, rounding, finiteness."""
        names = takes(function)
        compute, static, check = self.compute, dict(self.static), self.check_finite
        limit = math.inf if round_to is None else _overflow(round_to)

        def kernel(
            base: Tensor | None,
            models: list[Tensor],
            numbers: dict[str, Tensor],
            known: dict[str, Tensor],
            keys: Tensor,
            offset: Tensor,
        ) -> tuple[Tensor, Tensor]:
            given: dict[str, Any] = {**static, **numbers, **known}
            given["base"] = None if base is None else base.to(compute)
            given["models"] = [model.to(compute) for model in models]
            given["rng"] = Random(keys, offset)
            result = function(**{name: given.get(name) for name in names})
            read = [given["base"], *given["models"]] if base is not None else given["models"]
            if round_to is not None:
                # told before rounding: a fused kernel would not look at the rounded numbers
                wide = result.reshape(read[0].shape)
                read = [*read, torch.where(wide.abs() < limit, wide, torch.full_like(wide, torch.inf))]
                result = result.to(round_to)
            # a finite number less itself is 0: cheaper than looking at every number's class (the compiler takes 0 times
            # a number for 0, whatever the number)
            finite = sum(tensor - tensor for tensor in read).sum() == 0 if check else keys.new_ones(())
            return result, finite

        # the compiler keeps what it made by code object, and gives up at the ninth variant: a code object per kernel
        kernel.__code__ = kernel.__code__.replace(co_name=f"merge_by_{self.method.name}")
        return kernel


def _overflow(dtype: torch.dtype) -> float:
    """Return the least number that is rounded to infinity: half a step above the largest."""
    found = torch.finfo(dtype)
    return found.max + found.max / (2 / found.eps - 1) / 2


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fuse a kernel: one thread per call (the engine runs several calls at once), without holding Python's lock."""
    return torch.compile(
        function,
        dynamic=True,
        fullgraph=True,
        options={"cpp_wrapper": True, "cpp.threads": 1, "cpp.enable_kernel_profile": False},
    )


def prepare_compiler_cache() -> None:
    """Keep compiled kernels under the user's cache folder, unless the user chose another place."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merganser" / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
