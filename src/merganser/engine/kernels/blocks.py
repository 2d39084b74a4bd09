"""Cut tensors into blocks, and run a merge method over the blocks of one tensor.

Blocks are the unit of all arithmetic. Their borders depend on the tensor's shape, the method's scope and `Plan.block`, so
sums of measurements, and with them every output byte, are the same for any memory limit or number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...errors import MergeError, MethodError
from .block import Block
from .calls import Undecomposed
from .data import Data
from .kernels import Kernel, Kernels, Phase
from .values import Values

_NO_DATA: Data = MappingProxyType({})

Inputs = tuple[Tensor | None, Sequence[Tensor]]
"""The base, if the method takes one, and the models: whole tensors or blocks."""

BLOCK = 1 << 19
"""Most elements per block by default; a row, matrix or tensor that the method needs whole may be larger."""


# elements from which fused rounds are faster than what computes a statistic at once, which is not fused
_WORTH_ROUNDS = 1 << 16


def all_finite(base: Tensor | None, models: Sequence[Tensor]) -> bool:
    """Return whether no input holds NaN or infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in (*([] if base is None else [base]), *models))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape as rows and columns: a row is all weights of one output unit; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def working_shape(shape: Sequence[int], scope: str, role: str | None) -> tuple[int, ...]:
    """Return the shape in which kernels see a tensor.

    A row is all weights of one output unit. For scope "row", packed experts [experts, rows, columns] become one matrix
    [experts * rows, columns].

    Args:
        shape: Shape of the tensor.
        scope: "element", "row", "tensor" or "matrix", as in the method.
        role: Role of the tensor; None if unknown.
    """
    if scope == "row" and role == "expert" and len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return tuple(shape)


def block_ranges(shape: Sequence[int], scope: str, block: int) -> Iterator[tuple[int, int]]:
    """Cut a tensor into blocks, on borders between rows where rows are not longer than a block.

    Args:
        shape: Shape in which kernels see the tensor.
        scope: "element", "row", "tensor" or "matrix", as in the method.
        block: Elements of a block, at most; a row, tensor or matrix that the scope needs whole may be larger.

    Yields:
        First element and end of each block.
    """
    size = math.prod(shape)
    step = block_step(shape, scope, block)
    for start in range(0, size, step):
        yield start, min(start + step, size)


def block_step(shape: Sequence[int], scope: str, block: int) -> int:
    """Return the number of elements of every block of a tensor but the last; arguments as for `block_ranges`."""
    columns = matrix_shape(shape)[1]
    step = max(block // max(columns, 1), 1) * columns
    if scope == "tensor":
        step = math.prod(shape)
    elif scope == "matrix":
        step = math.prod(shape[-2:])
    elif scope == "element" and columns > block:
        step = block
    return max(step, 1)


def block_shape(shape: Sequence[int], scope: str, size: int) -> tuple[int, ...]:
    """Return the shape of a block of `size` elements, as the method gets it."""
    if scope == "tensor":
        return tuple(shape)
    if scope == "matrix":
        return tuple(shape[-2:])
    if scope == "row":
        columns = matrix_shape(shape)[1]
        return (size // columns if columns else 0, columns)
    return (size,)


class _Prepared(NamedTuple):
    """A kernel with the statistics of a tensor.

    Args:
        known: The statistics.
        fixed: The same on the device.
        kernel: The kernel.
    """

    known: tuple[tuple[str, Tensor], ...]
    fixed: tuple[dict[str, Tensor], dict[str, Tensor]]
    kernel: Kernel


def _same(before: tuple[tuple[str, Tensor], ...], now: tuple[tuple[str, Tensor], ...]) -> bool:
    """Return whether these are the same objects; statistics are never changed in place."""
    return len(before) == len(now) and all(a[0] == b[0] and a[1] is b[1] for a, b in zip(before, now, strict=True))


class TensorRun:
    """The work on one output tensor: its blocks, parameters, random keys and statistics.

    Args:
        kernels: The method's kernels.
        values: The parameters of this tensor.
        shape: Shape in which kernels see the tensor.
        random_keys: From `ops.random.keys`.
        block: Elements of a block, at most.
        turned: Whether its matrices are stored [inputs, outputs]; the method gets them [outputs, inputs].
    """

    def __init__(
        self,
        kernels: Kernels,
        values: Values,
        shape: tuple[int, ...],
        random_keys: Tensor,
        block: int,
        *,
        name: str = "tensor",
        turned: bool = False,
    ) -> None:
        self.name = name
        self.kernels = kernels
        self.values = values
        self.shape = shape
        self.size = math.prod(shape)
        self.turned = turned
        self.ranges = list(block_ranges(shape, kernels.method.scope, block))
        self._keys = random_keys.to(kernels.device)
        self._numbers = kernels.numbers(values)
        # by phase; threads may prepare the same kernel twice, which does no harm
        self._prepared: dict[Phase, _Prepared] = {}

    def of(self, name: str, random_keys: Tensor) -> TensorRun:
        """Return the work on another tensor of the same shape and parameters; faster than a new one."""
        other = object.__new__(TensorRun)
        other.__dict__.update(self.__dict__, name=name, _keys=random_keys.to(self.kernels.device), _prepared={})
        return other

    def measure(
        self,
        name: str,
        index: int,
        known: Mapping[str, Tensor],
        range_: tuple[int, int],
        base: Tensor | None,
        models: Sequence[Tensor],
        total: Tensor | None,
        data: Data = _NO_DATA,
    ) -> tuple[Tensor, bool]:
        """Add a block's measurement to the total of the blocks before it; also return whether the block is finite."""
        block, kernel = self._block(("measure", name, index), known, range_, base, models, data)
        over_rows = name in self.kernels.rows
        try:
            found, finite = kernel(block, None if over_rows else total)
        except Undecomposed as error:
            if not self._is_refused(base, models):
                raise MethodError(f"{self.name}: {error}") from error
            # the caller refuses the inputs
            return torch.tensor(math.nan) if total is None else total, False
        except MethodError as error:
            raise MethodError(f"{self.name}: {error}") from error
        if not over_rows:
            return self.kernels.measured(name, index, found, total), bool(finite)
        found = self.kernels.measured(name, index, found, None)
        # the first block allocates the total of all rows; each block fills in its own
        total = found.new_zeros(matrix_shape(self.shape)[0], *found.shape[1:]) if total is None else total
        total[self._rows(range_)] = found
        return total, bool(finite)

    def solve(self, name: str, index: int, total: Tensor, known: dict[str, Tensor], size: int) -> None:
        """Solve a round and put its result into `known`: as `previous`, or under its name if no later round is needed."""
        given = {key: value.cpu() for key, value in known.items()}
        given["size"] = torch.tensor(size, dtype=torch.float64)
        try:
            solved = self.kernels.solve(name, index, total, self.values, given)
        except MergeError as error:
            raise type(error)(f"{self.name}: {self.kernels.method.name}: {error}") from error
        early, last = self.kernels.round(name, index).early, len(self.kernels.method.statistics[name].rounds) - 1
        found = solved if index == last else early and early(solved)
        if found is None:
            known["previous"] = solved
        else:
            known[name] = found
            known.pop("previous", None)

    def at_once(self, name: str, known: dict[str, Tensor], base: Tensor | None, models: Sequence[Tensor]) -> bool:
        """Compute a one-block tensor's statistic without rounds, if it supports that; return whether it was done."""
        method = self.kernels.method
        if len(self.ranges) > 1 or method.statistics[name].at_once is None or method.from_data:
            return False
        if self.kernels.fused and self.size >= _WORTH_ROUNDS:
            return False
        given = {key: value.cpu() for key, value in known.items()}
        given["size"] = torch.tensor(self.size, dtype=torch.float64)
        block = self._at(self._fixed(known), self.ranges[0], base, models)
        known[name] = self.kernels.measure_at_once(name, block, self.values, given)
        return True

    def solve_statistics(
        self,
        read: Callable[[int, int], Inputs],
        refuse: Callable[[Inputs], None],
        data: Callable[[int, int], Data] = lambda *_: _NO_DATA,
    ) -> dict[str, Tensor]:
        """Measure and solve the statistics of a tensor, block by block, in order.

        Args:
            read: Returns the base (or None) and the models between two elements, flat.
            refuse: Called with the inputs of a block that is not finite; raises unless that is allowed.
            data: Returns the statistics from data of the block between two elements.

        Returns:
            The solved statistics by name, as `combine` takes them.
        """
        known: dict[str, Tensor] = {}
        for name, statistic, _ in self.kernels.statistics:
            whole = read(0, self.size)
            try:
                done = self.at_once(name, known, *whole)
            except Undecomposed as error:
                if self._is_refused(*whole):
                    refuse(whole)
                raise MethodError(f"{self.name}: {error}") from error
            if done:
                continue
            for index in range(len(statistic.rounds)):
                total: Tensor | None = None
                for range_ in self.ranges:
                    inputs = read(*range_)
                    total, finite = self.measure(name, index, known, range_, *inputs, total, data(*range_))
                    if not finite:
                        refuse(inputs)
                assert total is not None
                self.solve(name, index, total, known, self.size)
                if name in known:
                    break
        return known

    def _is_refused(self, base: Tensor | None, models: Sequence[Tensor]) -> bool:
        """Return whether inputs hold NaN or infinity, and these are not to be merged."""
        return self.kernels.check_finite and not all_finite(base, models)

    @property
    def together(self) -> Literal["joined", "stacked"] | None:
        """How it can be merged with tensors of the same kernels and parameters, as in `MergeMethod.together`."""
        how = self.values.together if len(self.ranges) == 1 else None
        return how if self.kernels.stacks or how == "joined" else None

    def merge_several(
        self, runs: Sequence[TensorRun], base: Tensor | None, models: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Measure, solve and combine tensors of this one's size, kernels and parameters at once, stacked.

        Args:
            runs: The work on each of them, k in number.
            base: Their bases, if the method takes one, shape [k, size].
            models: The same of the models.

        Returns:
            The merged tensors, shape [k, size], and whether the inputs and the result of each are finite, shape [k]. None if
            that fails: torch cannot stack every operation, and an error of one tensor is found by merging one by one.
        """
        try:
            return self._merge_several(runs, base, models)
        except Exception as error:
            self.kernels.merge_alone(error)
            return None

    def _merge_several(
        self, runs: Sequence[TensorRun], base: Tensor | None, models: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        kernels = self.kernels
        random = torch.stack([run._keys for run in runs]) if kernels.method.random else self._keys
        block = Block(base, models, {}, self._numbers, {}, random, 0)
        found: dict[str, Tensor] = {"size": torch.tensor(self.size, dtype=torch.float64)}
        for name, _, _ in kernels.statistics:
            found[name] = kernels.measure_at_once(name, block, self.values, found, several=True)
            block = replace(block, known={**block.known, name: kernels.to_device(found[name])})
        return kernels.combine_several(block)

    def combine(
        self,
        known: Mapping[str, Tensor],
        range_: tuple[int, int],
        base: Tensor | None,
        models: Sequence[Tensor],
        data: Data = _NO_DATA,
    ) -> tuple[Tensor, bool]:
        """Merge one block and return it flat; also return whether the inputs and the result are finite.

        Args:
            known: Solved statistics.
            range_: First element and end of the block.
            base: The block of the base, flat, if the method takes one.
            models: The same of the models.
            data: The statistics from data of the block, or of its matrix, a tensor per model.
        """
        block, kernel = self._block(("combine", "", 0), known, range_, base, models, data)
        try:
            merged, finite = kernel(block, None)
        except Undecomposed as error:
            if all_finite(base, models):
                raise MethodError(f"{self.name}: {error}") from error
            return torch.full((range_[1] - range_[0],), math.nan, dtype=self.kernels.output), False
        except MethodError as error:
            raise MethodError(f"{self.name}: {error}") from error
        return (merged.T if self.turned else merged).reshape(-1), bool(finite)

    def matrix(self, start: int) -> int:
        """Return the index of the matrix, in a packed tensor, that holds an element."""
        return start // math.prod(self.shape[-2:])

    def own_shape(self, range_: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of a block as the files have it; a method may get it turned."""
        return block_shape(self.shape, self.kernels.method.scope, range_[1] - range_[0])

    def _block(
        self,
        phase: Phase,
        known: Mapping[str, Tensor],
        range_: tuple[int, int],
        base: Tensor | None,
        models: Sequence[Tensor],
        data: Data = MappingProxyType({}),
    ) -> tuple[Block, Kernel]:
        """Return a block, and the kernel of a phase, which is the same for all blocks."""
        taken = tuple(known.items())
        prepared = self._prepared.get(phase)
        if prepared is None or not _same(prepared.known, taken):
            fixed = self._fixed(known)
            block = self._at(fixed, range_, base, models, data)
            self._prepared[phase] = _Prepared(taken, fixed, self.kernels.kernel(phase, block))
            return block, self._prepared[phase].kernel
        return self._at(prepared.fixed, range_, base, models, data), prepared.kernel

    def _fixed(self, known: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the solved statistics on the device: those over rows, and others."""
        sent = {name: self.kernels.to_device(value) for name, value in known.items()}
        over_rows = self.kernels.rows
        return {n: x for n, x in sent.items() if n in over_rows}, {n: x for n, x in sent.items() if n not in over_rows}

    def _at(
        self,
        fixed: tuple[dict[str, Tensor], dict[str, Tensor]],
        range_: tuple[int, int],
        base: Tensor | None,
        models: Sequence[Tensor],
        data: Data = MappingProxyType({}),
    ) -> Block:
        start, end = range_
        shape = block_shape(self.shape, self.kernels.method.scope, end - start)
        rows, others = fixed
        return Block(
            None if base is None else self._shaped(base, shape),
            [self._shaped(model, shape) for model in models],
            {name: value[self._rows(range_)] for name, value in rows.items()} if rows else {},
            self._numbers,
            others,
            self._keys,
            start,
            data,
        )

    def _shaped(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        block = flat.reshape(shape)
        return block.T if self.turned else block

    def _rows(self, range_: tuple[int, int]) -> slice:
        """Return the rows that a block of whole rows covers."""
        columns = matrix_shape(self.shape)[1]
        return slice(range_[0] // columns, range_[1] // columns)
