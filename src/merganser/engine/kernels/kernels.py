"""Turn a merge method into the functions that the engine runs on blocks.

A kernel takes blocks in the dtypes of the files, converts them to the compute dtype, calls the method, rounds once to
the output dtype and returns whether all numbers were finite. For large merges it is fused by `torch.compile`, from the
same source.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...method import MergeMethod, Round, Statistic, takes
from ...ops.random import Random
from ...ops.rounding import largest_rounding
from .compiled import Function, KernelError, compile_ahead, compiled_ahead, fused
from .data import Data
from .sums import join
from .values import Values

Phase = tuple[str, str, int]
_Kernel = Callable[["Block"], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Block:
    """What a kernel is called with.

    Args:
        base: The block of the base, if the method takes one, in its dtype in the file.
        models: The blocks of the other inputs.
        rows: Solved statistics of the block's rows, shape [rows, ...].
        numbers: Numeric parameters.
        known: Other solved statistics.
        keys: Keys of random draws, from `ops.random.keys`.
        offset: Index of the block's first element in the tensor, int64, 0-d.
        data: Statistics from data, a tensor per model; kernels that take them are never compiled.
    """

    base: Tensor | None
    models: Sequence[Tensor]
    rows: Mapping[str, Tensor]
    numbers: Mapping[str, Tensor]
    known: Mapping[str, Tensor]
    keys: Tensor
    offset: Tensor
    data: Data = field(default_factory=dict)

    def flat(self) -> list[Tensor]:
        """Return all tensors, in a fixed order."""
        others = [*self.numbers.values(), *self.known.values(), self.keys, self.offset]
        return [*self.inputs(), *self.rows.values(), *others]

    def rebuild(self, tensors: Sequence[Tensor]) -> Block:
        """Return a block of the same structure, made of other tensors in the order of `flat`."""
        left = iter(tensors)
        base = None if self.base is None else next(left)
        models = [next(left) for _ in self.models]
        rows, numbers, known = ({name: next(left) for name in own} for own in (self.rows, self.numbers, self.known))
        return Block(base, models, rows, numbers, known, next(left), next(left))

    @property
    def form(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
        """Dtypes and shapes that a compiled kernel is specialised on, in the order of `flat`; a size of 0 may vary."""
        others = (*self.numbers.values(), *self.known.values(), self.keys, self.offset)
        return (
            *((x.dtype, (0,) * x.dim()) for x in self.inputs()),
            *((x.dtype, (0, *x.shape[1:])) for x in self.rows.values()),
            *((x.dtype, tuple(x.shape)) for x in others),
        )

    def inputs(self) -> list[Tensor]:
        """Return the blocks of all inputs, the base first."""
        return [*self.models] if self.base is None else [self.base, *self.models]


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
    _functions: dict[Any, Callable[..., Any]] = field(default_factory=dict, repr=False)
    _fused: dict[Any, _Kernel] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @cached_property
    def statistics(self) -> list[tuple[str, Statistic, str]]:
        """Statistics to measure, in order: name, declaration, "row", "tensor" or "model"."""
        return [
            (name, statistic, statistic.where(self.static))
            for name, statistic in self.method.statistics.items()
            if self.static[f"measure {name}"]
        ]

    @cached_property
    def rows(self) -> frozenset[str]:
        """Names of the statistics with an entry per row."""
        return frozenset(name for name, _, over in self.statistics if over == "row")

    @cached_property
    def _unwanted(self) -> dict[str, None]:
        """Statistics that are not measured, as functions take them."""
        return {name: None for name in self.method.statistics if not self.static[f"measure {name}"]}

    def round(self, name: str, index: int) -> Round:
        """Return a round of a statistic."""
        return self.method.statistics[name].rounds[index]

    def numbers(self, values: Values) -> dict[str, Tensor]:
        """Return numeric parameters on the device."""
        return {name: value.to(self.device) for name, value in values.numbers.items()}

    def measure(self, name: str, index: int, block: Block, total: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add the measurement of a block to the total of the blocks before it; also return whether the block is finite.

        Args:
            name: Name of the statistic.
            index: Index of the round.
            block: The block.
            total: Total of the blocks before, on the CPU; it may be changed in place. None for the first block.
        """
        measured, finite = self._run(("measure", name, index), block)
        round_ = self.round(name, index)
        tally = round_.tally
        if tally is not None:
            known = {**block.rows, **block.known}
            return tally(measured, total, **{name: known[name] for name in takes(tally)[2:]}), finite
        measured = measured.cpu()
        measured = measured if measured.is_floating_point() else measured.to(torch.int64)
        return measured if total is None else join(total, measured, largest=round_.largest), finite

    def measure_at_once(
        self, name: str, block: Block, values: Values, known: Mapping[str, Tensor], *, several: bool = False
    ) -> Tensor:
        """Compute a statistic of a one-block tensor without its rounds.

        Args:
            name: Name of the statistic; it has `at_once`.
            block: The whole tensor.
            values: Parameters of the tensor.
            known: Earlier statistics and `size`, on the CPU.
            several: The block, and all statistics, are those of several tensors, stacked.
        """
        at_once = self.method.statistics[name].at_once
        assert at_once is not None
        names = takes(self.round(name, 0).measure)
        static = {**self._unwanted, **self.static}
        inputs = ([*block.inputs()], dict(block.rows), dict(block.known))

        def measure(inputs: list[Tensor], rows: Any, known: Any) -> Tensor:
            base, models = (None, inputs) if block.base is None else (inputs[0], inputs[1:])
            given = {**static, **block.numbers, **rows, **known}
            return at_once.measure({**given, **_read(base, models, self.compute, names)})

        earlier = {key: value for key, value in known.items() if key != "size"}
        given = {**static, **values.numbers, "size": known["size"]}
        if several:
            return at_once.solve(torch.vmap(measure)(*inputs), given, earlier)
        alone = {key: value.unsqueeze(0) for key, value in earlier.items()}
        return at_once.solve(measure(*inputs).unsqueeze(0), given, alone)[0]

    def solve(self, name: str, index: int, measured: Tensor, values: Values, known: Mapping[str, Tensor]) -> Tensor:
        """Solve a round of a statistic from the sum of its measurements.

        Args:
            name: Name of the statistic.
            index: Index of the round.
            measured: The sum over all blocks, on the CPU.
            values: Parameters of the tensor.
            known: Earlier statistics, `previous` and `size`, on the CPU.
        """
        solve = self.round(name, index).solve
        first, *rest = takes(solve)
        given = {**self._unwanted, **self.static, **values.numbers, **known}
        return solve(**{first: measured}, **{key: given[key] for key in rest})

    def combine(self, block: Block) -> tuple[Tensor, Tensor]:
        """Merge one block; also return whether the inputs and the result are finite."""
        return self._run(("combine", "", 0), block)

    def combine_several(self, block: Block) -> tuple[Tensor, Tensor]:
        """Merge several tensors of one shape and the same parameters in one call; also return whether each is finite.

        Args:
            block: Their inputs and statistics, stacked, and their keys where the method is random.
        """
        dims = (None if block.base is None else 0, 0, 0, None, 0, 0 if self.method.random else None, None, None)
        merged, finite = torch.vmap(self._function(("combine", "", 0)), in_dims=dims)(*_arguments(block))
        return merged, finite

    def to_device(self, solved: Tensor) -> Tensor:
        """Move a solved statistic to where kernels take it: floats in the compute dtype, integers as they are."""
        return solved.to(self.device, self.compute) if solved.is_floating_point() else solved.to(self.device)

    def run_eagerly(self, phase: Phase, block: Block) -> tuple[Tensor, Tensor]:
        """Run a kernel without fusing it."""
        return _on_block(self._function(phase))(block)

    def _run(self, phase: Phase, block: Block) -> tuple[Tensor, Tensor]:
        # torch.compile specialises on size 1; run such blocks eagerly
        if not self.compiled or min(block.models[0].shape, default=0) < 2:
            return self.run_eagerly(phase, block)
        form = (phase, block.form)
        with self._lock:
            if form not in self._fused:
                self._fused[form] = self._fuse(phase, block)
        try:
            return self._fused[form](block)
        except KernelError:
            # run eagerly, it fails with an error that gives the reason, mostly memory
            self.run_eagerly(phase, block)
            raise
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
                raise
            lines = str(error).splitlines()
            reason = next((line.strip() for line in lines if " error: " in line), lines[0])
            raise UnsupportedError(
                f"{self.method.name}: a kernel cannot be compiled here ({reason}). Check the C++ compiler, "
                "memory and disk space; or merge with --no-compile"
            ) from error

    def _fuse(self, phase: Phase, block: Block) -> _Kernel:
        """Compile a kernel for blocks of one form: ahead of time if that can be done, else just in time."""
        if self.device.type == "cpu" and compiled_ahead(self.method):
            kernel = compile_ahead(self._order(phase, block))
            if kernel is not None:
                return partial(_on_tensors, kernel)
        name = ("compiled", *phase)
        if name not in self._functions:
            self._functions[name] = fused(self._function(phase))
        return _on_block(self._functions[name])

    def _order(self, phase: Phase, block: Block) -> dict[str, Any]:
        """Return, as JSON, what a kernel for blocks of one form is made from; `compiler` reads it."""
        return {
            "method": self.method.name,
            "static": dict(self.static),
            "compute": _name(self.compute),
            "output": _name(self.output),
            "check_finite": self.check_finite,
            "phase": list(phase),
            "base": block.base is not None,
            "models": len(block.models),
            "rows": list(block.rows),
            "numbers": list(block.numbers),
            "known": list(block.known),
            "tensors": [[_name(dtype), shape] for dtype, shape in block.form],
        }

    def _function(self, phase: Phase) -> Callable[..., Any]:
        if phase not in self._functions:
            kind, name, index = phase
            if kind == "combine":
                self._functions[phase] = self._call(self.method.combine, round_to=self.output)
            else:
                self._functions[phase] = self._call(self.round(name, index).measure, round_to=None)
        return self._functions[phase]

    def _call(self, function: Callable[..., Tensor], *, round_to: torch.dtype | None) -> Callable[..., Any]:
        """Wrap a measure or combine function: conversion, what it takes by name, rounding, finiteness."""
        names = takes(function)
        compute, static, check = self.compute, dict(self.static), self.check_finite
        limit = math.inf if round_to is None else _overflow(round_to)

        def kernel(
            base: Tensor | None,
            models: list[Tensor],
            rows: dict[str, Tensor],
            numbers: dict[str, Tensor],
            known: dict[str, Tensor],
            keys: Tensor,
            offset: Tensor,
            data: Data,
        ) -> tuple[Tensor, Tensor]:
            given: dict[str, Any] = {
                **static,
                **rows,
                **numbers,
                **known,
                **data,
                **_read(base, models, compute, names),
            }
            given["rng"] = Random(keys, offset)
            result = function(**{name: given.get(name) for name in names})
            read = [given["base"], *given["models"]] if base is not None else given["models"]
            if round_to is not None:
                # checked before rounding: a fused kernel does not see the rounded numbers
                wide = result.reshape(read[0].shape)
                read = [*read, torch.where(wide.abs() < limit, wide, torch.full_like(wide, torch.inf))]
                result = result.to(round_to)
            # x - x is 0 if x is finite, else NaN: cheaper than isfinite, and the compiler would fold x * 0
            finite = sum(tensor - tensor for tensor in read).sum() == 0 if check else keys.new_ones(())
            return result, finite

        # torch.compile caches per code object and stops after 8 variants; give each kernel its own
        kernel.__code__ = kernel.__code__.replace(co_name=f"merge_by_{self.method.name}")
        return kernel


def _read(base: Tensor | None, models: list[Tensor], compute: torch.dtype, names: Sequence[str]) -> dict[str, Any]:
    """Return the inputs as functions take them, by name: in the compute dtype; with rounding errors if wanted."""
    given: dict[str, Any] = {"base": None if base is None else base.to(compute)}
    given["models"] = [model.to(compute) for model in models]
    if "rounding" in names:
        given["rounding"] = torch.stack([largest_rounding(model) for model in models])
    return given


def _overflow(dtype: torch.dtype) -> float:
    """Return the smallest number that rounds to infinity: half an ulp above the largest finite one."""
    found = torch.finfo(dtype)
    return found.max + found.max / (2 / found.eps - 1) / 2


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_tensors(kernel: Function, block: Block) -> tuple[Tensor, Tensor]:
    """Call a compiled kernel, whose arguments are a flat list of tensors, on a block."""
    result, finite = kernel(block.flat())
    return result, finite


def _on_block(kernel: Callable[..., tuple[Tensor, Tensor]]) -> _Kernel:
    """Let a kernel function take a block."""
    return lambda block: kernel(*_arguments(block))


def _arguments(block: Block) -> tuple[Any, ...]:
    """Return the arguments of a kernel function for a block."""
    known = (dict(block.rows), dict(block.numbers), dict(block.known))
    return block.base, list(block.models), *known, block.keys, block.offset, dict(block.data)
