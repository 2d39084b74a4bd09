"""Collect statistics of the inputs of a block's matrices: each token once, padding never."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...statistics import COUNT
from ..data.batches import Batch
from ..forward import internals
from ..forward.experts import ExpertInputs, expert_matrices, expert_modules, observed_experts, router_modules
from ..forward.forward import replaced
from ..forward.skeleton import Block, Skeleton
from ..output.writer import Sum
from .reducers import REDUCERS, Reducer, products_of

__all__ = ["Seen", "Tapped", "Taps", "check_inputs"]

_Key = tuple[str, int | None]

Observer = Callable[[str, int, Tensor], None]

Seen = dict[tuple[str, int], Tensor]
"""What matrices received of one batch, by the name of the parameter and how often it was used before."""


@dataclass(frozen=True)
class Tapped:
    """The sums for tensors of the checkpoint that received the same inputs.

    Args:
        names: The tensors.
        axis: The axis of these tensors that is contracted with the input.
        width: Number of features of an input.
        sums: By the name of the statistic. If one tensor holds all experts of a mixture, each sum has a leading axis
            for the experts.
    """

    names: tuple[str, ...]
    axis: int
    width: int
    sums: Mapping[str, Sum]


class _Inputs:
    """The sums over the inputs of one matrix."""

    def __init__(self, statistics: Sequence[str], width: int, *, summed: bool) -> None:
        self.width = width
        self.statistics = statistics
        self.count = 0
        self.reducers: dict[str, Reducer] = {name: REDUCERS[name](width) for name in statistics if summed}

    def add(self, rows: Tensor) -> None:
        """Add the inputs of some tokens, shape [tokens, width]."""
        self.count += len(rows)
        if self.reducers and len(rows):
            wide = rows.float()
            with products_of(rows.dtype):
                for reducer in self.reducers.values():
                    reducer.add(wide)


class Taps:
    """Sums over the inputs of every matrix in a block.

    Args:
        skeleton: The model.
        block: One of its blocks.
        statistics: Names of statistics; the number of tokens is always counted.
        observe: Called with the name of a parameter, how often its matrix was used before for this batch, and its inputs
            that count, shape [tokens, in], before they are added; once for parameters that receive the same inputs, and not
            for experts.
        summed: Whether to sum; otherwise the results only say which sums there would be, of which shapes.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        block: Block,
        statistics: Sequence[str],
        observe: Observer | None = None,
        *,
        summed: bool = True,
    ) -> None:
        self._block = block
        self._per_token = skeleton.per_token
        self._calls: Counter[str] = Counter()
        self._observe = observe
        self._summed = summed
        self._statistics = [name for name in statistics if name != COUNT]
        self._sources: dict[_Key, list[str]] = {}
        for source in block.sources:
            target = skeleton.targets[source]
            self._sources.setdefault((target.parameter, target.index), []).append(source)
        self._batch: Batch | None = None
        self._received: list[tuple[weakref.ref[Tensor], str]] = []
        # for every matrix, the first matrix in the block that receives the same input tensor
        self._leaders: dict[str, str] = {}
        self._inputs: dict[_Key, _Inputs] = {}
        self._axes: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the block's forward within the context."""
        axes = internals.linear_classes()
        routers = router_modules(self._block.module)
        with ExitStack() as stack:
            for name, module in self._block.module.named_modules():
                axis = next((axis for kind, axis in axes.items() if isinstance(module, kind)), None)
                # a router is a matrix of shape [experts, in] with a class of its own
                axis = 1 if axis is None and name in routers else axis
                parameter = f"{self._block.name}.{name}.weight"
                if axis is not None and (parameter, None) in self._sources:
                    self._axes[parameter] = axis
                    handle = module.register_forward_pre_hook(partial(self._receive, parameter))
                    stack.callback(handle.remove)
            forwards: dict[nn.Module, Callable[..., Any]] = {}
            for name, module in expert_modules(self._block.module).items():
                own = f"{self._block.name}.{name}"
                forwards[module] = observed_experts(module, partial(self._receive_expert, own))
                self._prepare_experts(own, module)
            stack.enter_context(replaced(forwards))
            yield

    def begin(self, batch: Batch) -> None:
        """Set the batch that the block reads next."""
        self._batch = batch
        self._received.clear()
        self._calls.clear()

    def _receive(self, parameter: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not inputs:
            return
        received: Tensor = inputs[0]
        leader = next((name for reference, name in self._received if reference() is received), parameter)
        if self._leaders.setdefault(parameter, leader) != leader:
            raise UnsupportedError(
                f"{parameter}: receives the same input as {leader} in some batches only; its statistics cannot be taken"
            )
        if leader != parameter:
            return
        self._received.append((weakref.ref(received), parameter))
        call = self._calls[parameter]
        self._calls[parameter] += 1
        counted = self._counted(parameter, call, received)
        if counted is None:
            return
        if (parameter, None) not in self._inputs:
            self._inputs[parameter, None] = _Inputs(self._statistics, received.shape[-1], summed=self._summed)
        rows = received.flatten(0, -2)
        rows = rows if bool(counted.all()) else rows[counted]
        if self._observe is not None:
            self._observe(parameter, call, rows)
        self._inputs[parameter, None].add(rows)

    def _prepare_experts(self, name: str, module: Any) -> None:
        """Create the sums of all experts, including those that will receive no token."""
        for own, axis in expert_matrices(module).items():
            parameter = f"{name}.{own}"
            experts, width = getattr(module, own).shape[0], getattr(module, own).shape[axis]
            for expert in range(experts):
                # not anew where watching continues
                if (parameter, expert) not in self._inputs:
                    self._inputs[parameter, expert] = _Inputs(self._statistics, width, summed=self._summed)
            # a checkpoint with one tensor per expert stores matrices of shape [out, in]
            self._axes[parameter] = axis if (parameter, None) in self._sources else 1

    def _receive_expert(self, module: str, inputs: ExpertInputs) -> None:
        assert self._batch is not None
        counted = self._batch.stacks[self._block.stack].counted.flatten()[inputs.tokens]
        self._inputs[f"{module}.{inputs.parameter}", inputs.expert].add(inputs.rows[counted])

    def _counted(self, parameter: str, call: int, received: Tensor) -> Tensor | None:
        """Return which rows of an input count, bool, shape [rows]; None if the rows are not the batch's tokens."""
        assert self._batch is not None
        if self._per_token:
            calls = self._per_token.get(parameter, ())
            if call >= len(calls) or not calls[call]:
                return None
        padded = self._batch.stack_of(received.shape[:-1])
        if padded is not None:
            return padded.counted.flatten()
        if not self._per_token:
            return None
        raise UnsupportedError(
            f"{self._batch.where[0]}: {parameter} receives an input of shape {list(received.shape)}, which has no row per "
            "token as in other batches; its statistics cannot be taken"
        )

    def results(self) -> list[Tapped]:
        """Return all sums, once the block is done."""
        found: list[Tapped] = []
        for (parameter, expert), inputs in self._inputs.items():
            own = self._sources.get((parameter, expert), [])
            if expert is None:
                followers = [other for other, leader in self._leaders.items() if leader == parameter]
                own = [name for other in followers for name in self._sources[other, None]]
            if own:
                found.append(Tapped(tuple(own), self._axes[parameter], inputs.width, _sums([inputs], stacked=False)))
            elif expert == 0 and (parameter, None) in self._sources:
                experts = [each for (other, _), each in self._inputs.items() if other == parameter]
                names = tuple(self._sources[parameter, None])
                found.append(Tapped(names, self._axes[parameter], inputs.width, _sums(experts, stacked=True)))
        return found


def _sums(inputs: Sequence[_Inputs], *, stacked: bool) -> dict[str, Sum]:
    """Return the sums over a matrix's inputs; if `stacked`, of all experts, with a leading axis."""
    lead = (len(inputs),) if stacked else ()

    def take(name: str) -> Tensor:
        found = [each.reducers.pop(name).result() for each in inputs]
        return torch.stack(found) if stacked else found[0]

    counts = [each.count for each in inputs]
    sums = {COUNT: Sum(lead, "int64", lambda: torch.tensor(counts if stacked else counts[0]))}
    for name in inputs[0].statistics:
        kind = REDUCERS[name]
        sums[name] = Sum((*lead, *kind.shape_of(inputs[0].width)), kind.stored_as, partial(take, name))
    return sums


def check_inputs(skeleton: Skeleton, statistics: Sequence[str]) -> None:
    """Check that statistics of inputs can be had of a checked model.

    Raises:
        UnsupportedError: Some are wanted, and there is no matrix in the blocks whose inputs are seen.
    """
    if not any(name in REDUCERS for name in statistics) or any(any(calls) for calls in skeleton.per_token.values()):
        return
    if not any(expert_modules(block.module) for block in skeleton.blocks):
        raise UnsupportedError(
            f"{skeleton.checkpoint.reference}: {type(skeleton.model).__name__} multiplies by classes of its own, not by linear "
            "layers, so the inputs of its matrices are not seen; only statistics of gradients can be had"
        )
