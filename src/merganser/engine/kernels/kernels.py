"""Turn a merge method into the functions that the engine runs on blocks.

A kernel takes blocks in the dtypes of the files, converts them to the compute dtype, calls the method, rounds once to
the output dtype and returns whether all numbers were finite. On a CPU its operations are fused into loops by
`engine.fusion`; on a GPU by `torch.compile`.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import MergeError, MethodError
from ...method import MergeMethod, Statistic, takes
from ...method.statistic import Round
from ...ops.linalg.rounding import rounding_in
from ...ops.random import Random
from ..fusion.graph import Unfusable
from ..fusion.trace import Form
from .block import Block, arguments, rebuild
from .calls import call
from .data import Data
from .sums import join
from .values import Values

if TYPE_CHECKING:
    from ..fusion.run import Program

_logger = logging.getLogger(__name__)

Phase = tuple[str, str, int]
Kernel = Callable[[Block, "Tensor | None"], tuple[Tensor, Tensor]]
"""Gets a block, and the total of what it measured before; returns what it measures or merges, or that total if it was added to,
and whether all is finite."""


@dataclass
class Kernels:
    """The kernels of a method for one combination of static parameters and dtypes.

    Args:
        method: The merge method.
        static: Flags, counts and choices by argument name, and which statistics are wanted, as in `Values`.
        compute: float32, or float64 where an input or the output is.
        output: Dtype of the result.
        device: Where the kernels run.
        fused: Fuse operations: on a CPU into loops in machine code, on a GPU by `torch.compile`.
        check_finite: Whether kernels look for NaN and infinity.

    Attributes:
        stacks: Whether small tensors are merged in one call where that gives the same bytes.
    """

    method: MergeMethod
    static: Mapping[str, Any]
    compute: torch.dtype
    output: torch.dtype
    device: torch.device
    fused: bool = False
    check_finite: bool = True
    stacks: bool = True
    _functions: dict[Any, Callable[..., Any]] = field(default_factory=dict, repr=False)

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

    @cached_property
    def _settings(self) -> int:
        """The number of these settings, which is the same for all kernels with them."""
        settings = (self.method, tuple(self.static.items()), self.compute, self.output, self.check_finite)
        return _numbers.setdefault(settings, next(_next))

    def round(self, name: str, index: int) -> Round:
        """Return a round of a statistic."""
        return self.method.statistics[name].rounds[index]

    def numbers(self, values: Values) -> Mapping[str, Tensor]:
        """Return numeric parameters on the device."""
        if self.device.type == "cpu":
            return values.numbers
        return {name: value.to(self.device) for name, value in values.numbers.items()}

    def measured(self, name: str, index: int, found: Tensor, total: Tensor | None) -> Tensor:
        """Add the measurement of a block to the total of the blocks before it.

        Args:
            name: Name of the statistic.
            index: Index of the round.
            found: What the kernel measured; or the total, if the kernel has added to it.
            total: Total of the blocks before, on the CPU. None for the first block.
        """
        found = found.cpu()
        found = found if found.is_floating_point() else found.to(torch.int64)
        if total is None or found is total:
            return found
        return join(total, found, largest=self.round(name, index).largest)

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
            read = {**given, **_read(base, models, self.compute, names)}
            return call(self.method, partial(at_once.measure, read), {})

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
        return call(self.method, solve, {first: measured, **{key: given[key] for key in rest}})

    def merge_alone(self, error: Exception) -> None:
        """Merge small tensors one by one from now on, as a call for several of them has failed."""
        self.stacks = False
        if not isinstance(error, MergeError) or isinstance(error, MethodError):
            self._say(("several", "", 0), f"small tensors are merged one by one: {error}")

    def combine_several(self, block: Block) -> tuple[Tensor, Tensor]:
        """Merge several tensors of one shape and the same parameters in one call; also return whether each is finite.

        Args:
            block: Their inputs and statistics, stacked, and their keys where the method is random.
        """
        dims = (None if block.base is None else 0, 0, 0, None, 0, 0 if self.method.random else None, None, None)
        function = torch.vmap(self._function(("combine", "", 0)), in_dims=dims)
        if not self.fused or self.device.type != "cpu" or block.models[0].numel() < _WORTH_A_PROGRAM:
            merged, finite = function(*arguments(block))
            return merged, finite
        # a tensor is a row, and its statistics and keys are those of a row
        own = {**block.known, **({"": block.keys} if self.method.random else {})}
        fixed = [*block.numbers.values(), *(() if self.method.random else (block.keys,))]
        forms = (
            *(Form("block", x.dtype) for x in block.inputs()),
            *(Form("rows", x.dtype, tuple(x.shape[1:])) for x in own.values()),
            *(Form("fixed", x.dtype, tuple(x.shape)) for x in fixed),
        )

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            left = iter(tensors)
            base = None if block.base is None else next(left)
            models = [next(left) for _ in block.models]
            known = {name: next(left) for name in block.known}
            random = next(left) if self.method.random else None
            numbers = {name: next(left) for name in block.numbers}
            keys = next(left) if random is None else random
            return function(*arguments(Block(base, models, {}, numbers, known, keys, 0)))  # type: ignore[no-any-return]

        program = self._make(("several", "", 0), flat, forms, block.models[0].shape[1], block)
        if isinstance(program, str) or not program.takes(block.models[0].shape):
            merged, finite = function(*arguments(block))
        else:
            merged, finite = program.bind(fixed)([*block.inputs(), *own.values()])
        return merged, finite

    def to_device(self, solved: Tensor) -> Tensor:
        """Move a solved statistic to where kernels take it: floats in the compute dtype, integers as they are."""
        return solved.to(self.device, self.compute) if solved.is_floating_point() else solved.to(self.device)

    def kernel(self, phase: Phase, block: Block) -> Kernel:
        """Return the function that measures or combines a block, and says whether inputs and result are finite.

        Args:
            phase: "combine", or "measure" with the statistic's name and the index of the round.
            block: Any block of the tensor. The function takes others with the same numbers, statistics and keys.
        """
        function = self._function(phase)

        def eager(block: Block, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return function(*arguments(block))  # type: ignore[no-any-return]

        if not self.fused or block.data:
            return eager
        if self.device.type != "cpu":
            return self._compiled(phase, eager)
        program = self.program(phase, block)
        if isinstance(program, str):
            self._say(phase, f"a pass cannot be fused: {program}")
            return eager
        if not program.takes(block.models[0].shape):
            return eager
        bound = program.bind(block.fixed())

        def fused(block: Block, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if not program.takes(block.models[0].shape):
                return eager(block)
            result, finite = bound([*block.inputs(), *block.rows.values(), block.offset], total)
            return result, finite

        return fused

    def program(self, phase: Phase, like: Block) -> Program | str:
        """Return a kernel as loops in machine code; or why it cannot be fused.

        Args:
            phase: As in `kernel`.
            like: A block with the inputs, numbers and statistics that the kernel takes.
        """
        function = self._function(phase)

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            return function(*arguments(rebuild(like, tensors)))  # type: ignore[no-any-return]

        columns = like.models[0].shape[1] if self.method.scope == "row" else None
        return self._make(phase, flat, like.forms(), columns, like)

    def _make(
        self, phase: Phase, flat: Callable[..., Any], forms: tuple[Form, ...], columns: int | None, like: Block
    ) -> Program | str:
        """Make a program, or find it made for another tensor."""
        key = (
            self._settings,
            phase,
            forms,
            columns,
            *map(tuple, (like.rows, like.numbers, like.known)),
            like.base is None,
        )
        with _lock:
            if key not in _programs:
                # needs llvmlite, which some machines lack
                from ..fusion.run import Program

                try:
                    _programs[key] = Program(flat, forms, columns)
                except Unfusable as reason:
                    _programs[key] = str(reason)
            return _programs[key]

    def _compiled(self, phase: Phase, eager: Kernel) -> Kernel:
        """Return a kernel for a GPU."""
        name = ("compiled", *phase)
        if name not in self._functions:
            self._functions[name] = torch.compile(self._function(phase), dynamic=True, fullgraph=True)
        compiled = self._functions[name]

        def run(block: Block, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
            # torch.compile specialises on size 1
            if min(block.models[0].shape, default=0) < 2:
                return eager(block, total)
            try:
                return compiled(*arguments(block))  # type: ignore[no-any-return]
            except RuntimeError as error:
                if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
                    raise
                self._say(phase, f"a pass cannot be fused: {str(error).partition(chr(10))[0]}")
                return eager(block, total)

        return run

    def _say(self, phase: Phase, reason: str) -> None:
        """Tell the user, once, why something is slower than it might be."""
        if (self.method, phase) not in _said:
            _said.add((self.method, phase))
            _logger.warning("%s: slower than it might be, as %s", self.method.name, reason)

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
        method, compute, static, check = self.method, self.compute, dict(self.static), self.check_finite
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
            result = call(method, function, {name: given.get(name) for name in names})
            read = [given["base"], *given["models"]] if base is not None else given["models"]
            if round_to is not None:
                # a single number may come with any number of dimensions
                alike = result.shape == read[0].shape or result.numel() == read[0].numel() == 1
                if not alike or not result.is_floating_point():
                    raise MethodError(
                        f"merge method {method.name}: returned {result.dtype} of shape {list(result.shape)} for a block of "
                        f"shape {list(read[0].shape)}; it must return floats in the shape of the block"
                    )
                # checked before rounding: a fused kernel does not see the rounded numbers
                read = [*read, torch.where(result.abs() < limit, result, torch.full_like(result, torch.inf))]
                result = result.to(round_to)
            # x - x is 0 if x is finite, else NaN, which is the largest: cheaper than isfinite
            finite = sum(tensor - tensor for tensor in read).amax() == 0 if check else keys.new_ones(())
            return result, finite

        # torch.compile caches per code object and stops after 8 variants; give each kernel its own
        kernel.__code__ = kernel.__code__.replace(co_name=f"merge_by_{self.method.name}")
        return kernel


def _read(base: Tensor | None, models: list[Tensor], compute: torch.dtype, names: Sequence[str]) -> dict[str, Any]:
    """Return the inputs as functions take them, by name: in the compute dtype; with rounding errors if wanted."""
    given: dict[str, Any] = {"base": None if base is None else base.to(compute)}
    given["models"] = [model.to(compute) for model in models]
    if "rounding" in names:
        given["rounding"] = torch.stack([rounding_in(model) for model in models])
    return given


def _overflow(dtype: torch.dtype) -> float:
    """Return the smallest number that rounds to infinity: half an ulp above the largest finite one."""
    found = torch.finfo(dtype)
    return found.max + found.max / (2 / found.eps - 1) / 2


# number of elements from which compiling a loop for stacked tensors pays off
_WORTH_A_PROGRAM = 1 << 17

# settings of kernels by number: hashing the number is much faster than hashing the settings
_numbers: dict[Any, int] = {}
_next = itertools.count()
# programs of this process, for all runs; the lock also keeps two threads from making the same one
_programs: dict[Any, Program | str] = {}
_lock = threading.Lock()
# messages that were already shown to the user
_said: set[tuple[MergeMethod, Phase]] = set()
